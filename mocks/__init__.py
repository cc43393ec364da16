"""Mock backends for development and tests: real servers that fail on demand."""
