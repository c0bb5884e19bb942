"""The HTTP doors: webhooks, chat, health."""
