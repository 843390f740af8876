"""Reading chunks that differ in nothing but their text, without parsing each of them.

Most engines send chunk after chunk like that. What stands around the text is learned from a chunk that was
parsed; where it stands around a text again, that one can be cut out, many of a packet at once. Whatever does
not follow the template to the byte, or has an escape in its text, is parsed.
"""

import re

CONTENT = re.compile(rb'"content":\s*"')
DATA, END = b"data: ", b"\n\n"


class ChunkTemplate:
    """What stands around the text in the chunks of one stream.

    Args:
        head: The bytes before the text, with its quotation mark.
        tail: Those behind it.
    """

    def __init__(self, head: bytes, tail: bytes) -> None:
        self._head, self._tail = head, tail
        self._start, self._end = DATA + head, tail + END
        self._between = self._end + self._start

    @classmethod
    def learned(cls, data: bytes, text: str) -> "ChunkTemplate | None":
        """The template that a chunk follows, or None if its text has escapes.

        Args:
            data: The chunk's JSON.
            text: The text in it.
        """
        literal, found = text.encode(), CONTENT.search(data)
        if found is None or _has_escapes(literal):
            return None
        head, rest = data[: found.end()], data[found.end() :]
        return cls(head, rest[len(literal) :]) if rest.startswith(literal + b'"') else None

    def text_of(self, data: bytes) -> str | None:
        """The text of a chunk, or None if the chunk has to be parsed.

        Args:
            data: Its JSON.
        """
        if data.startswith(self._head) and data.endswith(self._tail):
            literal = data[len(self._head) : -len(self._tail)]
            if not _has_escapes(literal):
                return literal.decode()
        return None

    def take(self, packet: bytes) -> tuple[list[str], bytes]:
        """Read the chunks at the beginning of a packet.

        Args:
            packet: Bytes of a stream, from the beginning of an event on.

        Returns:
            Their texts, and what is left to be parsed.
        """
        end = packet.rfind(self._end)
        if end < len(self._start) or not packet.startswith(self._start):
            return [], packet
        block = packet[len(self._start) : end]
        first, last = len(self._start), -len(self._tail)
        # Splitting at what stands between the texts takes twice as long as this, since it is so long.
        events = packet[: end + len(self._tail)].split(END)
        literals = [event[first:last] for event in events]
        if self._between.join(literals) != block or _has_escapes(b"".join(literals)):
            return [], packet
        return [literal.decode() for literal in literals if literal], packet[end + len(self._end) :]


def _has_escapes(literal: bytes) -> bool:
    """Whether it is more, or less, than the plain characters of a JSON string."""
    return b'"' in literal or b"\\" in literal
