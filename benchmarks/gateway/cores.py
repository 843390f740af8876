"""Which core does what: the servers share one, one at a time; the upstream and the load have the others."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Cores:
    """The cores' numbers."""

    server: frozenset[int]
    load: frozenset[int]

    @property
    def apart(self) -> bool:
        """Whether the server has a core to itself; without it the figures mean nothing."""
        return not self.server & self.load

    @classmethod
    def divided(cls) -> "Cores":
        """The cores that this process may use, divided; with a single one everything shares it."""
        first, *others = sorted(os.sched_getaffinity(0))
        return cls(frozenset({first}), frozenset(others or {first}))
