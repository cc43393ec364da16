"""The journal as a file: every line once, over restarts, rotations and whatever becomes of the file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from usage.journal_file import HEAD_BYTES, LINE_MAX_BYTES, READ_MAX_BYTES, JournalFile, Position

LINES = [b"%03d %s" % (number, b"x" * (number % 7)) for number in range(90)]
TEXT = b"".join(line + b"\n" for line in LINES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.jsonl"


def old(path: Path) -> Path:
    return path.with_name(path.name + ".old")


def everything(journal: JournalFile) -> list[bytes]:
    """What can be read now."""
    lines = []
    while some := journal.read():
        lines += some
    return lines


def restarted(path: Path, journal: JournalFile, *, rotated_bytes: int = 1 << 20) -> JournalFile:
    """As after a restart: nothing is known but the place that was written down."""
    journal.close()
    return JournalFile(path, Position.read(journal.position.written()), rotated_bytes=rotated_bytes)


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


# --- Reading.


def test_file_that_is_not_there_yet_is_empty(path: Path) -> None:
    journal = JournalFile(path, Position())
    assert journal.read() == []
    assert not journal.is_large
    assert not journal.has_old
    append(path, TEXT)
    assert everything(journal) == LINES


def test_lines_are_read_as_they_come(path: Path) -> None:
    journal, read = JournalFile(path, Position()), []
    for start in range(0, len(TEXT), 13):
        append(path, TEXT[start : start + 13])
        read += everything(journal)
    assert read == LINES


def test_torn_line_waits_for_its_rest(path: Path) -> None:
    append(path, b"one\ntw")
    journal = JournalFile(path, Position())
    assert everything(journal) == [b"one"]
    assert journal.position.offset == 4
    append(path, b"o\n")
    assert everything(journal) == [b"two"]


def test_more_than_is_read_at_once_is_read_in_parts(path: Path) -> None:
    lines = [b"%06d" % number + b"y" * 3000 for number in range(300)]
    append(path, b"\n".join(lines) + b"\n")
    journal = JournalFile(path, Position())
    parts = []
    while some := journal.read():
        parts.append(some)
    assert [line for part in parts for line in part] == lines
    assert len(parts) > 2


@pytest.mark.parametrize(
    "size", [READ_MAX_BYTES - 1, READ_MAX_BYTES, READ_MAX_BYTES + 1, 3 * READ_MAX_BYTES, LINE_MAX_BYTES - 1]
)
@pytest.mark.parametrize("before", [b"", b"a\n"], ids=["first", "second"])
def test_long_line_is_read_whole(path: Path, size: int, before: bytes) -> None:
    append(path, before + b"x" * size + b"\nb\n")
    lines = everything(JournalFile(path, Position()))
    assert [len(line) for line in lines] == [1] * len(before.split()) + [size, 1]


@pytest.mark.parametrize("size", [LINE_MAX_BYTES, LINE_MAX_BYTES + 1, 3 * LINE_MAX_BYTES + 5])
def test_line_longer_than_any_does_not_stop_the_others(path: Path, size: int) -> None:
    append(path, b"a\n" + b"x" * size + b"\nb\nc\n")
    lines = everything(JournalFile(path, Position()))
    assert lines[0] == b"a"
    assert lines[-2:] == [b"b", b"c"]
    assert set(b"".join(lines[1:-2])) == {ord("x")}


def test_long_line_that_is_being_written_is_waited_for(path: Path) -> None:
    append(path, b"x" * (2 * READ_MAX_BYTES))
    journal = JournalFile(path, Position())
    assert journal.read() == []
    append(path, b"y\nb\n")
    assert [len(line) for line in everything(journal)] == [2 * READ_MAX_BYTES + 1, 1]


# --- Restarts.


@pytest.mark.parametrize("first", [1, 50, 90])
def test_restart_at_every_byte_reads_every_line_once(path: Path, first: int) -> None:
    """However much of the file was there when the place was written down."""
    for cut in range(0, len(TEXT) + 1, first):
        path.write_bytes(TEXT[:cut])
        journal = JournalFile(path, Position())
        read = everything(journal)
        append(path, TEXT[cut:])
        journal = restarted(path, journal)
        assert read + everything(journal) == LINES
        journal.close()


def test_file_is_known_again_by_its_beginning_however_short_it_was(path: Path) -> None:
    for line in LINES:
        append(path, line + b"\n")
        journal = JournalFile(path, Position())
        everything(journal)
        assert everything(restarted(path, journal)) == []
        journal.close()
    assert len(TEXT) > HEAD_BYTES


@pytest.mark.parametrize("longer", [True, False], ids=["by a longer one", "by a shorter one"])
def test_file_that_was_replaced_while_the_ledger_was_away_is_read_from_its_beginning(path: Path, longer: bool) -> None:
    append(path, TEXT)
    journal = JournalFile(path, Position())
    everything(journal)
    path.write_bytes(b"new\n" * (1000 if longer else 2))
    assert len(everything(restarted(path, journal))) == (1000 if longer else 2)


def test_file_that_is_replaced_while_it_is_read_is_read_to_its_end_and_then_the_new_one(path: Path) -> None:
    append(path, b"a\n")
    journal = JournalFile(path, Position())
    assert everything(journal) == [b"a"]
    with path.open("ab") as envoy:
        path.unlink()
        assert journal.read() == []
        envoy.write(b"b\n")
    assert everything(journal) == [b"b"]
    append(path, b"c\n")
    assert everything(journal) == [b"c"]
    assert everything(restarted(path, journal)) == []


def test_file_that_is_cut_to_nothing_is_read_from_its_beginning(path: Path) -> None:
    append(path, TEXT)
    journal = JournalFile(path, Position())
    everything(journal)
    path.write_bytes(b"")
    assert journal.read() == []
    append(path, b"b\n")
    assert everything(journal) == [b"b"]


@given(st.integers(0, 2**40), st.integers(0, 2**32 - 1))
def test_place_reads_as_it_was_written(offset: int, head: int) -> None:
    position = Position(offset=offset, head=head)
    assert Position.read(position.written()) == position


def test_no_place_is_the_beginning() -> None:
    assert Position.read("") == Position()


# --- Rotation.


def test_rotation_loses_no_line(path: Path) -> None:
    append(path, b"a\nb\n")
    journal = JournalFile(path, Position(), rotated_bytes=4)
    with path.open("ab") as envoy:
        assert everything(journal) == [b"a", b"b"]
        assert journal.is_large
        journal.rotate()
        assert journal.is_aside
        envoy.write(b"c\n")
        envoy.flush()
        assert everything(journal) == [b"c"]
        assert not journal.is_large
        envoy.write(b"d\n")
    append(path, b"e\n")  # Envoy has been told to open a new one
    assert not journal.is_aside
    assert everything(journal) == [b"d", b"e"]
    assert journal.has_old
    journal.forget_old()
    assert not old(path).exists()
    assert not journal.has_old


def test_old_file_stays_until_the_new_one_is_there(path: Path) -> None:
    append(path, b"a\n")
    journal = JournalFile(path, Position(), rotated_bytes=1)
    everything(journal)
    journal.rotate()
    assert journal.read() == []
    assert not journal.has_old
    journal.forget_old()
    assert old(path).exists()


def test_no_file_is_put_aside_while_another_is(path: Path) -> None:
    append(path, b"a\n")
    journal = JournalFile(path, Position(), rotated_bytes=1)
    everything(journal)
    journal.rotate()
    append(path, b"b\n")
    everything(journal)
    assert journal.has_old
    assert not journal.is_large
    journal.forget_old()
    assert journal.is_large


class Reader:
    """Reads, and writes down where it is with what it has read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._place = ""
        self.lines: list[bytes] = []
        self.journal = JournalFile(path, Position(), rotated_bytes=1)

    def read(self) -> None:
        while some := self.journal.read():
            self.lines += some
            self._place = self.journal.position.written()

    def restart(self) -> None:
        self.journal.close()
        self.journal = JournalFile(self._path, Position.read(self._place), rotated_bytes=1)


STEPS = ["write", "read", "rotate", "write old", "new", "read", "write", "read", "forget", "write", "read"]


@pytest.mark.parametrize("restart", range(len(STEPS)))
def test_restart_at_every_step_of_a_rotation_reads_every_line_once(path: Path, restart: int) -> None:
    reader, written = Reader(path), []
    for index, step in enumerate(STEPS):
        if index == restart:
            reader.restart()
        match step:
            case "read":
                reader.read()
            case "rotate":
                reader.read()
                assert reader.journal.is_large
                reader.journal.rotate()
            case "new":
                append(path, b"")
            case "forget":
                reader.read()
                assert reader.journal.has_old
                reader.journal.forget_old()
            case _:
                written.append(b"%d" % index)
                append(old(path) if step == "write old" else path, written[-1] + b"\n")
    assert reader.lines == written


def test_old_file_without_a_known_place_is_read_first(path: Path) -> None:
    """After the place was lost, both are read again."""
    append(old(path), b"a\nb\n")
    append(path, b"c\n")
    assert everything(JournalFile(path, Position())) == [b"a", b"b", b"c"]


# --- What is left to read.


def test_what_is_there_and_has_not_been_read_is_told(path: Path) -> None:
    journal = JournalFile(path, Position(), rotated_bytes=1)
    assert journal.unread_bytes == 0
    append(path, TEXT)
    assert journal.unread_bytes == len(TEXT)
    everything(journal)
    assert journal.unread_bytes == 0
    journal.rotate()
    append(old(path), b"more\n")
    append(path, b"new\n")
    assert journal.unread_bytes == len(b"more\nnew\n")
    assert everything(journal) == [b"more", b"new"]
    assert journal.unread_bytes == 0
