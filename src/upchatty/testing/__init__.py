"""Fakes and servers for tests, ours and those of programs that call UpChatty.

- `FaultyUpstream`: an OpenAI-compatible server in a process of its own that fails on demand, down to
  the byte, and speaks every dialect of the protocol that real ones do.
- `ScriptedEngine`: one inside the test's event loop, whose answers the test writes one by one.
- `running_server`: UpChatty itself, inside the test's event loop.

Each is loaded when it is first asked for, so that the faulty upstream does not load the server.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upchatty.testing.dialects import DIALECTS
    from upchatty.testing.faulty_upstream import FAULTS, Behaviour
    from upchatty.testing.scripted import RecordedRequest, ScriptedAnswer, ScriptedEngine, running_server
    from upchatty.testing.upstream import FaultyUpstream, Stats

__all__ = [
    "DIALECTS",
    "FAULTS",
    "Behaviour",
    "FaultyUpstream",
    "RecordedRequest",
    "ScriptedAnswer",
    "ScriptedEngine",
    "Stats",
    "running_server",
]

_MODULES = {
    "dialects": ("DIALECTS",),
    "faulty_upstream": ("FAULTS", "Behaviour"),
    "scripted": ("RecordedRequest", "ScriptedAnswer", "ScriptedEngine", "running_server"),
    "upstream": ("FaultyUpstream", "Stats"),
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        for module, names in _MODULES.items():
            if name in names:
                return getattr(import_module(f"{__name__}.{module}"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
