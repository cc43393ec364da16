"""The ledger: Envoy's access log settles what was reserved."""
