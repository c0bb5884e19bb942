"""A self-hosted chat-bot webhook server, and its conversation store as a library."""

__version__ = "0.1.0"
