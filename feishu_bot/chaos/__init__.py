"""The chaos driver: server processes, messages and accidents at once, and whether the promise was kept."""
