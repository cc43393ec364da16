"""The limit store: what extproc admits with, usage settles with and the command shows."""
