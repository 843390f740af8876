"""Reading server-sent events as engines send them.

Format: https://html.spec.whatwg.org/multipage/server-sent-events.html, of which engines use data
and comment lines. Events arrive several in one packet, or one in several.
"""

from upchatty.errors import EngineFailed

LONGEST_EVENT = 4 * 1024 * 1024  # bytes; an engine that sends more without a line's end is broken


class EventReader:
    """Cuts a byte stream into the data of its events."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    @property
    def is_between_events(self) -> bool:
        """Whether the next byte begins an event."""
        return not self._rest and not self._data

    def feed(self, packet: bytes) -> list[bytes]:
        """Take the next bytes.

        Args:
            packet: Any number of bytes, cut anywhere.

        Returns:
            The data of every event that is now complete.

        Raises:
            EngineFailed: An event is longer than any real one.
        """
        if self.is_between_events and packet.startswith(b"data: ") and packet.endswith(b"\n\n"):
            events = packet[6:-2].split(b"\n\ndata: ")
            if packet.count(b"\n") == 2 * len(events):
                return events  # whole events of a line each, as nearly all packets
        *lines, self._rest = (self._rest + packet).split(b"\n")
        if len(self._rest) > LONGEST_EVENT:
            raise EngineFailed(problem=f"it sent an event of more than {LONGEST_EVENT} bytes")
        events = []
        for line in lines:
            if line.startswith(b"data:"):
                self._data.append(line[5:].strip())
            elif self._data and not line.strip():
                events.append(b"\n".join(self._data))
                self._data = []
        return events
