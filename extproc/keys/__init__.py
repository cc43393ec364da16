"""API keys: where they are looked up."""
