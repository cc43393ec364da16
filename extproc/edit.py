"""Changes of a body's text that leave every other character as it came."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from extproc.json_body import Document


@dataclass(frozen=True, slots=True)
class Edit:
    """A replacement of ``text[start:end]``, in characters; where both are the same, an insertion."""

    start: int
    end: int
    replacement: str

    @property
    def moved(self) -> int:
        """How far everything after the edit moves."""
        return len(self.replacement) - (self.end - self.start)


def setting(document: Document, name: str, value: str) -> Edit:
    """The edit that gives a top-level member a value, as JSON text: in its place, or else as the first of several."""
    if name in document.members:
        return Edit(*document.place(name), value)
    opening = document.text.index("{") + 1
    return Edit(opening, opening, f'"{name}":{value},')


def in_order(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """Edits of one text from its start to its end, as the other functions take them.

    Insertions at one place keep their order.

    Raises:
        ValueError: two of them overlap.
    """
    ordered = tuple(sorted(edits, key=lambda edit: (edit.start, edit.end)))
    for before, after in pairwise(ordered):
        if after.start < before.end:
            raise ValueError(f"edits overlap: {before.start}-{before.end} and {after.start}-{after.end}")
    return ordered


def edited(text: str, edits: Sequence[Edit]) -> str:
    """The text with every edit in place."""
    parts, at = [], 0
    for edit in edits:
        parts += [text[at : edit.start], edit.replacement]
        at = edit.end
    return "".join([*parts, text[at:]]) if parts else text


def place_after(edits: Sequence[Edit], place: tuple[int, int]) -> tuple[int, int]:
    """Where in the edited text a place is that no edit touches."""
    start, end = place
    moved = sum(edit.moved for edit in edits if edit.end <= start)
    return start + moved, end + moved
