"""Run a program that dies with its parent: ``python -I -S leash.py PARENT_PID SIGNAL PROGRAM ARGUMENT…``.

It asks the kernel (Linux, ``PR_SET_PDEATHSIG``) to send SIGNAL to this process when the parent dies, however it
dies, and becomes PROGRAM: the request survives exec, and the process id stays the same. A wrapper rather than
``preexec_fn``, because that runs Python between fork and exec. Two traps:

- The kernel means the *thread* that forked, not its process. ``router up`` forks from its event loop, which is
  its main thread and ends only with the process.
- The parent may have died before the request was made, so it is compared after it.

It reaches this process only: a program with processes of its own must end them itself, and is sent SIGTERM
rather than SIGKILL. Elsewhere than on Linux this does nothing.
"""

from __future__ import annotations

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1
CANNOT_RUN = 127


def main() -> None:
    """Take the leash and become the program."""
    parent, number, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0)
        if os.getppid() != int(parent):
            sys.exit(f"{command[0]}: its parent is gone")
    try:
        os.execvp(command[0], command)  # noqa: S606  (what the caller asked for)
    except OSError as error:
        print(f"cannot run {command[0]}: {error.strerror}", file=sys.stderr)
        sys.exit(CANNOT_RUN)


if __name__ == "__main__":
    main()
