"""REQUEST -> DECISION: the ext_proc server that authenticates, validates and routes each request."""
