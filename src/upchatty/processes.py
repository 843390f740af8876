"""Processes: their names, and children that end with their parent."""

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

LINUX_PR_SET_PDEATHSIG = 1  # prctl(2)


def die_with(parent: int, when_told: Callable[[], object] | None = None) -> None:
    """End this process when its parent does, even if that is killed.

    The end of the pipe on standard input tells it everywhere; on Linux the kernel does, also while a
    library keeps the interpreter to itself.

    Args:
        parent: The parent's process id.
        when_told: Called from another thread when the parent sends something through the pipe.
    """
    end_with(parent)
    threading.Thread(target=_watch_pipe, args=(when_told,), daemon=True).start()


def end_with(parent: int) -> None:
    """Let the kernel end this process with its parent, where it can; at once if that is gone already.

    Args:
        parent: The parent's process id.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(LINUX_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _watch_pipe(when_told: Callable[[], object] | None) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        if when_told:
            when_told()
    os._exit(0)


def give_way(niceness: int = 0) -> None:
    """Let other processes compute first.

    Linux may share out the processor among sessions before it does among processes (sched(7), "The autogroup
    feature"), so the leader of a session has to say it for that too.

    Args:
        niceness: How much is added to what this process has from its parent.
    """
    if not hasattr(os, "nice"):
        return
    nice = os.nice(niceness)
    if sys.platform == "linux" and os.getsid(0) == os.getpid():
        with suppress(OSError):  # the kernel has no such feature
            Path("/proc/self/autogroup").write_text(str(nice))


def process_name() -> str:
    """This process, told from every other one: where it runs, its id, and when it was started."""
    return f"{_machine()}:{os.getpid()}:{psutil.Process().create_time():.2f}"


def is_gone(name: str) -> bool:
    """Whether a process of this machine runs no longer; of other machines' nobody here can tell.

    Args:
        name: As `process_name` made it.
    """
    machine, pid, started = name.rsplit(":", 2)
    if machine != _machine():
        return False
    try:
        process = psutil.Process(int(pid))
        return abs(process.create_time() - float(started)) > 1 or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
    except psutil.Error:
        return False


@cache
def _machine() -> str:
    """What process ids belong to: the machine, or the container."""
    with suppress(OSError):
        return f"{socket.gethostname()}:{Path('/proc/self/ns/pid').readlink()}"
    return socket.gethostname()
