"""The router command."""
