"""One file per platform; ``base.platform_types`` finds them."""
