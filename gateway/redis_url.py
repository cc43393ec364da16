"""Addresses of Redis and Valkey, as settings and options give them."""

from __future__ import annotations

from urllib.parse import urlsplit


def redis_url(address: str) -> str:
    """URL of an address: ``host:port``, ``redis://…``, ``rediss://…`` or ``unix:///path``.

    Raises:
        ValueError: none of these; the text does not repeat the address, which may hold a password.
    """
    url = address if "://" in address else f"redis://{address}"
    forms = "use host:port, redis://…, rediss://… or unix:///path"
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError(f"not a Redis address; {forms}") from None
    if parts.scheme in {"redis", "rediss"} and parts.hostname:
        return url
    if parts.scheme == "unix" and not parts.netloc.rpartition("@")[2] and parts.path.startswith("/"):
        return url
    raise ValueError(f"not a Redis address; {forms}")
