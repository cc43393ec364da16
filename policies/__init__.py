"""Routing policy: the YAML operators write and the pure model of it."""
