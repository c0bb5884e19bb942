"""How great a test of great numbers is: a size that shows the fault in every run, or the full one.

``FULL_SIZE=1 make test TESTS=tests/ai/test_conversation_concurrency.py`` runs it at its full size.
"""

from __future__ import annotations

import os

FULL_SIZE = os.environ.get("FULL_SIZE", "0") not in {"", "0"}
