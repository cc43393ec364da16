"""Readers of single values: names, numbers, money, durations, URIs. Pure.

A reader returns the value or raises :class:`Wrong`. Values that may be secrets are not repeated in messages.
"""

from __future__ import annotations

import ipaddress
import re
from fractions import Fraction
from typing import Final, Literal, TypeVar

from gateway import names
from policies.model import BackendUri
from policies.nodes import Cursor, Read, Scalar, Wrong, describe, shown, suggestion

C = TypeVar("C", bound=str)

NAME_MAX_BYTES: Final = 256
TEXT_MAX_CHARS: Final = 4096
DURATION_MAX_S: Final = 86_400.0
MICRO_PER_USD: Final = 1_000_000
USD_MAX: Final = 1_000_000_000
PRICE_USD_MAX: Final = 10_000
"""For 1,000 tokens: at it the longest answer costs far less than the 2**53 micro-dollars up to which sums are exact."""

_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_SEPARATOR = re.compile(r"[\s,]")
_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,17})")
_DECIMAL = re.compile(r"[0-9]{1,12}(?:\.[0-9]{0,18})?|\.[0-9]{1,18}")
_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(ms|s|m|h)")
_UNIT_S = {"ms": Fraction("0.001"), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600)}
_URI = re.compile(r"(?P<scheme>[A-Za-z]+)://(?P<authority>[^/]*)(?P<path>/.*)?")
_AUTHORITY = re.compile(r"(?P<host>\[[^\]]*\]|[^:\[\]]*)(?::(?P<port>[0-9]{1,5}))?")
_HOST_LABEL = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_URI_PATH = re.compile(r"(?:/(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})+)*/?")
_REQUEST_PATH = re.compile(r"/[\x21-\x22\x24-\x7e]*")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,128}")
_HEADER_PREFIX = re.compile(r"[\x20-\x7e]{0,128}")
_HEADERS_OF_HTTP = frozenset(
    {"host", "content-length", "content-type", "connection", "transfer-encoding", "te", "trailer", "upgrade"}
)


def text(at: Cursor) -> str:
    """A string as written: quoted or not, ``on`` and ``1.0`` stay what they are."""
    if not isinstance(at.node, Scalar) or at.node.kind == "null":
        raise Wrong(f"expected a string, got {describe(at.node)}")
    value = at.node.text
    if not value:
        raise Wrong("must not be empty")
    if len(value) > TEXT_MAX_CHARS:
        raise Wrong(f"is longer than {TEXT_MAX_CHARS} characters")
    if _CONTROL.search(value):
        raise Wrong("holds a control character")
    return value


def name(at: Cursor) -> str:
    """Name of a model, an organisation or a key: at most 256 bytes, no whitespace, no comma.

    It becomes a header value and part of comma-joined ones.
    """
    value = text(at)
    if _SEPARATOR.search(value):
        raise Wrong(f"{shown(value)} holds whitespace or a comma")
    if len(value.encode()) > NAME_MAX_BYTES:
        raise Wrong(f"is longer than {NAME_MAX_BYTES} bytes")
    return value


def boolean(at: Cursor) -> bool:
    """``true`` or ``false``, unquoted."""
    if isinstance(at.node, Scalar) and at.node.kind == "bool":
        return at.node.text.lower() == "true"
    raise Wrong(f"expected true or false, got {describe(at.node, show=True)}")


def integer(low: int, high: int) -> Read[int]:
    """Reader of a whole number from ``low`` to ``high``."""

    def read_integer(at: Cursor) -> int:
        if not isinstance(at.node, Scalar) or at.node.quoted or not _INTEGER.fullmatch(at.node.text):
            raise Wrong(f"expected a whole number, got {describe(at.node, show=True)}")
        value = int(at.node.text)
        if not low <= value <= high:
            raise Wrong(f"must be from {low} to {high}, got {value}")
        return value

    return read_integer


def micro_usd(at: Cursor) -> int:
    """Dollars as written, exactly, in micro-dollars."""
    if not isinstance(at.node, Scalar) or at.node.quoted or not _DECIMAL.fullmatch(at.node.text):
        raise Wrong(f"expected an amount in dollars such as 0.005, got {describe(at.node, show=True)}")
    micro = Fraction(at.node.text) * MICRO_PER_USD
    if micro > USD_MAX * MICRO_PER_USD:
        raise Wrong(f"must be at most {USD_MAX}")
    if micro.denominator != 1:
        raise Wrong(f"{at.node.text} has more than 6 decimals")
    return micro.numerator


def price_micro_usd(at: Cursor) -> int:
    """As :func:`micro_usd`, for the price of 1,000 tokens."""
    micro = micro_usd(at)
    if micro > PRICE_USD_MAX * MICRO_PER_USD:
        raise Wrong(f"must be at most {PRICE_USD_MAX}")
    return micro


def duration_s(at: Cursor) -> float:
    """Seconds of ``500ms``, ``30s``, ``2m`` or ``1h``; more than zero, at most a day."""
    value = duration_or_zero_s(at)
    if value == 0:
        raise Wrong("must be longer than 0")
    return value


def duration_or_zero_s(at: Cursor) -> float:
    """As :func:`duration_s`, and ``0s`` is allowed."""
    match = _DURATION.fullmatch(at.node.text) if isinstance(at.node, Scalar) else None
    if match is None:
        raise Wrong(f"expected a duration such as 30s or 500ms, got {describe(at.node, show=True)}")
    value = float(Fraction(match[1]) * _UNIT_S[match[2]])
    if value > DURATION_MAX_S:
        raise Wrong("must be at most 24h")
    return value


def choice(*options: C) -> Read[C]:
    """Reader of one of a few words."""

    def read_choice(at: Cursor) -> C:
        value = text(at)
        chosen = next((option for option in options if option == value), None)
        if chosen is None:
            hint = suggestion(value, frozenset(options))
            raise Wrong(f"expected {' or '.join(options)}, got {shown(value)}{hint}")
        return chosen

    return read_choice


def uri(at: Cursor) -> BackendUri:
    """``http(s)://host[:port][/prefix]``; a host is a name, an IPv4 address or an [IPv6] address."""
    value = text(at)
    if "@" in value.rpartition("://")[2].partition("/")[0]:
        raise Wrong("a URI must not hold a user or password; use 'credential'")
    if "?" in value or "#" in value:
        raise Wrong("a backend URI has no query and no fragment")
    match = _URI.fullmatch(value)
    scheme = match["scheme"].lower() if match else ""
    if match is None or scheme not in {"http", "https"}:
        raise Wrong(f"expected a URI such as http://host:8000, got {shown(value)}")
    authority = _AUTHORITY.fullmatch(match["authority"])
    host = _host(authority["host"]) if authority else None
    if authority is None or host is None:
        raise Wrong("what follows '://' is not a host with an optional port")
    kept: Literal["http", "https"] = "https" if scheme == "https" else "http"
    port = int(authority["port"] or (443 if kept == "https" else 80))
    if not 1 <= port <= 65_535:  # noqa: PLR2004 - the range of a TCP port
        raise Wrong(f"port {port} is not from 1 to 65535")
    path = match["path"] or ""
    if not _URI_PATH.fullmatch(path) or {".", ".."} & set(path.split("/")):
        raise Wrong(f"{shown(path)} is not a path prefix")
    return BackendUri(scheme=kept, host=host, port=port, path_prefix=path.rstrip("/"))


def _host(written: str) -> str | None:
    """Host in lower case, without brackets; None where it is none."""
    try:
        if written.startswith("["):
            return None if "%" in written else str(ipaddress.IPv6Address(written[1:-1]))
        labels = written.removesuffix(".").split(".")
        if labels[-1].isdigit():
            return str(ipaddress.IPv4Address(written))
    except ValueError:
        return None
    fits = len(written) <= 253 and all(map(_HOST_LABEL.fullmatch, labels))  # noqa: PLR2004 - RFC 1035
    return written.lower() if fits else None


def request_path(at: Cursor) -> str:
    """Path of an HTTP request, from '/'; a query is allowed."""
    return _matching(at, _REQUEST_PATH, "expected a path that begins with '/'")


def env_name(at: Cursor) -> str:
    """Name of an environment variable."""
    return _matching(at, _ENV_NAME, "is not the name of an environment variable")


def header_name(at: Cursor) -> str:
    """Name, in lower case, of a header that may carry a credential."""
    value = _matching(at, _HEADER_NAME, "is not the name of a header")
    value = value.lower()
    if value in _HEADERS_OF_HTTP or value.startswith(names.INTERNAL_HEADER_PREFIX):
        raise Wrong(f"header {value} cannot carry a credential")
    return value


def header_prefix(at: Cursor) -> str:
    """What stands before a credential in its header; may be empty."""
    if isinstance(at.node, Scalar) and at.node.quoted and not at.node.text:
        return ""
    return _matching(at, _HEADER_PREFIX, "holds characters that a header cannot carry")


def _matching(at: Cursor, pattern: re.Pattern[str], otherwise: str) -> str:
    value = text(at)
    if pattern.fullmatch(value):
        return value
    raise Wrong(otherwise)
