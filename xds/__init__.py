"""POLICY -> ENVOY: the control plane that turns routing policy into Envoy resources."""
