"""HTTP/2 and gRPC for one trusted peer on a unix socket: Envoy (RFC 9113, "gRPC over HTTP2").

``frames``, ``headers``, ``sender`` and ``connection`` are sans-io; only ``server`` knows asyncio. ADR 0009 says why.
"""
