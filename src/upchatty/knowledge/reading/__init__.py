"""Reads documents of every format, in a process of its own that may fail without harm."""

from upchatty.knowledge.reading.errors import Unreadable
from upchatty.knowledge.reading.readers import Readers

__all__ = ["Readers", "Unreadable"]
