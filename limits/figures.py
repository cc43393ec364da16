"""Figures of limits as one line of text, for the access log and the records made of it. Pure.

``1 org 100 99 10;6 key/alice 500000000 499985000 86400000``: kind, subject, limit, remaining and milliseconds until it
is whole again. In a subject ``%`` and ``;`` are percent-encoded, everything else stands as it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from limits.model import Figure, LimitKind

_CODES: Final = {kind: str(kind.value) for kind in LimitKind}


def written(figures: Iterable[Figure]) -> str:
    """The line; '' for no figures."""
    return ";".join(
        [
            f"{_CODES[kind]} {subject if '%' not in subject and ';' not in subject else _escaped(subject)} "
            f"{limit} {remaining} {reset_ms}"
            for kind, subject, limit, remaining, reset_ms in figures
        ]
    )


def read(text: str) -> tuple[Figure, ...]:
    """The figures of a line.

    Raises:
        ValueError: the line has another form.
    """
    return tuple(map(_figure, text.split(";"))) if text else ()


def _figure(text: str) -> Figure:
    code, _, rest = text.partition(" ")
    subject, limit, remaining, reset_ms = rest.rsplit(" ", 3)
    return Figure(LimitKind(int(code)), _unescaped(subject), int(limit), int(remaining), int(reset_ms))


def _escaped(subject: str) -> str:
    return subject.replace("%", "%25").replace(";", "%3B")


def _unescaped(subject: str) -> str:
    return subject.replace("%3B", ";").replace("%25", "%")
