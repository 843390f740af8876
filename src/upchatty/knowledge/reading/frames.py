"""What the server and the reading process say to each other: a length of 8 bytes, then MessagePack."""

from msgspec import Struct, msgpack

from upchatty.knowledge.blocks import Reading

LENGTH_BYTES = 8
READY = b"."  # what the reading process says first


class Task(Struct, frozen=True, kw_only=True):
    """A document to be read; the fields are those of `Readers.read`."""

    content: bytes
    name: str | None
    media_type: str | None
    url: str | None
    main_content: bool


class Result(Struct, frozen=True, kw_only=True):
    """What came of it: one of the two."""

    reading: Reading | None = None
    problem: str | None = None


def frame(message: Task | Result) -> bytes:
    """The message with its length before it."""
    body = msgpack.encode(message)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body
