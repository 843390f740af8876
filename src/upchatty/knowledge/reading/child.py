"""The process that reads documents: `python -m upchatty.knowledge.reading.child PARENT MEMORY`.

It takes tasks from standard input and answers on standard output, see `frames`, and ends with its parent.
"""

import os
import queue
import sys
import threading
from typing import BinaryIO

from msgspec import msgpack

from upchatty.knowledge.reading.errors import Unreadable
from upchatty.knowledge.reading.formats import read_document
from upchatty.knowledge.reading.frames import LENGTH_BYTES, READY, Result, Task, frame
from upchatty.processes import end_with, give_way

if sys.platform != "win32":
    import resource

RECURSION = 5000  # frames; what is nested deeper than they allow is refused


def main() -> None:
    """Read until the parent ends or closes the pipe."""
    parent, memory = (int(argument) for argument in sys.argv[1:])
    end_with(parent)
    give_way()  # as much as the worker does
    _limit_memory(memory)
    sys.setrecursionlimit(RECURSION)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not get among the frames
    answers.write(READY)
    answers.flush()
    tasks: queue.Queue[bytes] = queue.Queue()
    threading.Thread(target=_receive, args=(sys.stdin.buffer, tasks), daemon=True).start()
    while True:
        answers.write(frame(_result(tasks.get())))
        answers.flush()


def _limit_memory(memory: int) -> None:
    if sys.platform != "win32":
        try:
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        except (ValueError, OSError):
            pass  # the system knows no such limit, or has a stricter one


def _receive(pipe: BinaryIO, tasks: queue.Queue[bytes]) -> None:
    """Pass tasks on. A thread of its own, so that the pipe's end is noticed in the midst of a document."""
    try:
        while length := pipe.read(LENGTH_BYTES):
            tasks.put(pipe.read(int.from_bytes(length, "big")))
    finally:
        os._exit(0)


def _result(body: bytes) -> Result:
    try:
        task = msgpack.decode(body, type=Task)
        reading = read_document(
            task.content,
            name=task.name,
            media_type=task.media_type,
            url=task.url,
            main_content=task.main_content,
        )
        return Result(reading=reading)
    except Unreadable as error:
        return Result(problem=str(error))
    except MemoryError:
        return Result(
            problem="reading it takes more memory than a document may have; split it into smaller files"
        )
    except RecursionError:
        return Result(problem="it is nested too deeply to be read")
    except Exception as error:  # noqa: BLE001 - the libraries raise whatever a broken file makes them stumble over
        return Result(problem=f"the file is damaged, or is not what it seems to be ({type(error).__name__})")


if __name__ == "__main__":
    main()
