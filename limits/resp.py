"""Commands to Redis and Valkey as bytes (RESP2). Pure."""

from __future__ import annotations


def packed(*arguments: bytes) -> bytes:
    """Arguments of a command, as they follow one another in it."""
    return b"".join([b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments])


def pack(*arguments: bytes) -> bytes:
    """A whole command."""
    return b"*%d\r\n%b" % (len(arguments), packed(*arguments))
