"""The whole installation, every component a process of its own."""
