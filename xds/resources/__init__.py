"""Envoy resources, one file for each kind; pure functions of a policy."""
