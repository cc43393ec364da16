"""Writing keys: the same three operations on a file and on Redis, for the ``router keys`` command.

Synchronous, and unlike the stores that only look up, these know every key.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

import redis
from redis.exceptions import RedisError, WatchError

from extproc.keys.key_file import KeyFileInvalid, format_key_file, parse_key_file
from extproc.keys.record import KeyRecord, RecordInvalid, from_json, to_json
from extproc.keys.redis_store import CHANNEL, index_name, record_name
from gateway.redis_url import redis_url
from policies.model import KeyId

TIMEOUT_S: Final = 5.0


class RegisterError(Exception):
    """A register that cannot be read or written; the text is for the operator."""


class KeyExists(RegisterError):
    """The register already has a key of this id."""


class KeyRegister(Protocol):
    """Every key of one store."""

    @property
    def name(self) -> str:
        """What the operator calls it: ``file`` or ``redis``."""
        ...

    def records(self) -> tuple[KeyRecord, ...]:
        """All keys. Raises RegisterError."""
        ...

    def add(self, record: KeyRecord) -> None:
        """Store a new key. Raises RegisterError; KeyExists when its id is taken."""
        ...

    def revoke(self, key_id: KeyId) -> bool:
        """Set a key's status to revoked, for good; False when there is no such key. Raises RegisterError."""
        ...


class FileRegister:
    """The key file: rewritten as a whole under a lock, so that two writers lose nothing and readers see no half."""

    name = "file"

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()  # a link stays a link: what it points to is replaced

    def records(self) -> tuple[KeyRecord, ...]:
        """All keys of the file; none when there is no file yet."""
        try:
            return parse_key_file(self._path.read_text(encoding="utf-8"), file=str(self._path))
        except FileNotFoundError:
            return ()
        except KeyFileInvalid as error:
            raise RegisterError(str(error)) from None
        except UnicodeDecodeError:
            raise RegisterError(f"{self._path}: is not UTF-8") from None
        except OSError as error:
            raise RegisterError(f"{self._path}: cannot be read: {error.strerror}") from error

    def add(self, record: KeyRecord) -> None:
        """Append a key."""

        def append(records: tuple[KeyRecord, ...]) -> tuple[KeyRecord, ...]:
            if any(record.id == other.id or record.digest == other.digest for other in records):
                raise KeyExists(f"{self._path} already has a key {record.id}")
            return (*records, record)

        self._change(append)

    def revoke(self, key_id: KeyId) -> bool:
        """Mark a key as revoked; it stays in the file."""
        found = False

        def mark(records: tuple[KeyRecord, ...]) -> tuple[KeyRecord, ...]:
            nonlocal found
            found = any(record.id == key_id for record in records)
            return tuple(replace(record, status="revoked") if record.id == key_id else record for record in records)

        self._change(mark)
        return found

    def _change(self, change: Callable[[tuple[KeyRecord, ...]], tuple[KeyRecord, ...]]) -> None:
        try:
            with self._locked():
                before = self.records()
                after = change(before)
                if after != before:
                    self._replace(format_key_file(after))
        except OSError as error:
            raise RegisterError(f"{self._path}: cannot be written: {error.strerror}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Exclusive use of the file, by a lock beside it: the file itself is replaced, and a lock on it with it."""
        descriptor = os.open(f"{self._path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _replace(self, text: str) -> None:
        descriptor, temporary = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")  # 0600
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                with suppress(
                    FileNotFoundError, PermissionError
                ):  # root must not take the file from the service's user
                    owner = self._path.stat()
                    os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


class RedisRegister:
    """Keys in Redis. Every change is one transaction that also tells the running workers.

    Raises:
        ValueError: the address has no known form.
    """

    name = "redis"

    def __init__(self, address: str) -> None:
        self._client: Any = redis.Redis.from_url(
            redis_url(address), socket_timeout=TIMEOUT_S, socket_connect_timeout=TIMEOUT_S
        )

    def records(self) -> tuple[KeyRecord, ...]:
        """All keys, in the order of their ids."""
        with _told_as_register_error():
            names = sorted(self._client.scan_iter(match=index_name("*"), count=1000))
            digests = self._client.mget(names) if names else []
            found = self._client.mget([record_name(d.decode()) for d in digests if d]) if any(digests) else []
            return tuple(from_json(text) for text in found if text)

    def add(self, record: KeyRecord) -> None:
        """Store a key under its digest and its id."""
        index, name = index_name(record.id), record_name(record.digest)

        def write(pipe: Any) -> None:
            if pipe.exists(index, name):
                raise KeyExists(f"redis already has a key {record.id}")
            pipe.multi()
            pipe.set(index, record.digest)
            pipe.set(name, to_json(record))
            pipe.publish(CHANNEL, record.digest)

        with _told_as_register_error():
            self._client.transaction(write, index, name)

    def revoke(self, key_id: KeyId) -> bool:
        """Mark a key as revoked, and publish that it changed: also when it was revoked already."""
        with _told_as_register_error():
            digest = self._client.get(index_name(key_id))
            if digest is None:
                return False
            name = record_name(digest.decode())
            while True:
                try:
                    with self._client.pipeline() as pipe:
                        pipe.watch(name)
                        text = pipe.get(name)
                        if text is None:
                            return False
                        pipe.multi()
                        pipe.set(name, to_json(replace(from_json(text), status="revoked")))
                        pipe.publish(CHANNEL, digest)
                        pipe.execute()
                        return True
                except WatchError:
                    continue

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()


@contextmanager
def _told_as_register_error() -> Iterator[None]:
    try:
        yield
    except RecordInvalid as error:
        raise RegisterError(f"redis holds a record that cannot be read: {error}") from None
    except (RedisError, OSError) as error:
        raise RegisterError(f"redis: {error}") from error
