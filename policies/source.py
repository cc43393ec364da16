"""Policy files on disk: which there are, their text as one bundle, and the copy of the last good one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from gateway.telemetry import get_logger
from policies.model import Place, PolicyRejected, Problem

SUFFIXES: Final = (".yaml", ".yml")
BUNDLE_MAX_BYTES: Final = 64 * 1024 * 1024
_READ_TRIES: Final = 5

Signature: TypeAlias = tuple[tuple[str, int, int, int, int], ...]
"""Name, device, inode, mtime in ns and size of each file, links followed; zeros where there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The text of a directory's policy files, sorted by name.

    ``digest`` is the hex SHA-256 of names and texts; ``directory`` is for messages and not part of it.
    """

    directory: str
    files: tuple[tuple[str, str], ...]
    digest: str

    @classmethod
    def of(cls, directory: str, files: Iterable[tuple[str, str]]) -> Bundle:
        """Bundle of (name, text) pairs."""
        ordered = tuple(sorted(files))
        digest = hashlib.sha256()
        for part in (part for pair in ordered for part in pair):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "big") + data)
        return cls(directory=directory, files=ordered, digest=digest.hexdigest())


def list_files(directory: Path) -> list[Path]:
    """Policy files of a directory, sorted: not those of its subdirectories, not dot files.

    Raises:
        OSError: the directory is absent or cannot be read.
    """
    return sorted(path for path in directory.iterdir() if path.suffix in SUFFIXES and not path.name.startswith("."))


def signature(paths: Iterable[Path]) -> Signature:
    """What changes when one of the files does."""
    return tuple(_stat(path) for path in paths)


def _stat(path: Path) -> tuple[str, int, int, int, int]:
    try:
        found = path.stat()
    except OSError:
        return (str(path), 0, 0, 0, 0)
    return (str(path), found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size)


def read_bundle(directory: Path) -> Bundle:
    """Read a directory's policy files as they were at one moment.

    Files replaced meanwhile, as by a ConfigMap update, are read again.

    Raises:
        PolicyRejected: no directory, no policy file, or files that cannot be read: all of those.
    """
    for _ in range(_READ_TRIES):
        try:
            paths = list_files(directory)
        except OSError as error:
            raise PolicyRejected((_problem(str(directory), f"cannot be read: {error.strerror}"),)) from error
        before = signature(paths)
        files, problems = _read_all(directory, paths)
        if signature(paths) == before:
            break
    if not paths:
        problems = [_problem(str(directory), f"holds no policy file ({', '.join('*' + s for s in SUFFIXES)})")]
    if problems:
        raise PolicyRejected(tuple(problems))
    return Bundle.of(str(directory), files)


def _read_all(directory: Path, paths: list[Path]) -> tuple[list[tuple[str, str]], list[Problem]]:
    files: list[tuple[str, str]] = []
    problems: list[Problem] = []
    room = BUNDLE_MAX_BYTES
    for path in paths:
        try:
            data = _read(path, room)
            room -= len(data)
            files.append((path.name, data.decode()))
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            problems.append(_problem(str(path), f"is not UTF-8: byte 0x{error.object[error.start]:02x}", line))
        except OSError as error:
            problems.append(_problem(str(path), f"cannot be read: {error.strerror or error}"))
    return files, problems


def _read(path: Path, room: int) -> bytes:
    # O_NONBLOCK: opening a pipe must not wait for its writer.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError("not a regular file")
        data = file.read(room + 1)
    if len(data) > room:
        raise OSError(f"the policy files are larger than {BUNDLE_MAX_BYTES} bytes")
    return data


def save_last_good(bundle: Bundle, path: Path) -> None:
    """Keep a bundle that was put in force. Atomic and durable; readable by the owner only.

    Raises:
        OSError: it cannot be written; what was there before is still there.
    """
    content = {"digest": bundle.digest, "directory": bundle.directory, "files": bundle.files}
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_last_good(path: Path) -> Bundle | None:
    """The bundle kept by :func:`save_last_good`; None where there is none or, with a log line, a broken one."""
    try:
        content = json.loads(path.read_bytes())
        bundle = Bundle.of(str(content["directory"]), ((str(name), str(text)) for name, text in content["files"]))
        intact = bundle.digest == content["digest"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        get_logger().warning("last_good_policy_unreadable", path=str(path), error=repr(error))
        return None
    if not intact:
        get_logger().warning("last_good_policy_unreadable", path=str(path), error="digest differs")
        return None
    return bundle


def _problem(file: str, text: str, line: int = 1) -> Problem:
    return Problem(place=Place(file=file, line=line), text=text)
