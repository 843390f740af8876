"""What a GGUF file's header tells about the memory that its model takes.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package would read it too,
but needs NumPy, and reads every tensor's description.
"""

import mmap
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

Value = bool | int | float | str | list[int]
Metadata = Mapping[str, Value]

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
INTEGERS = "BbHhIiQq"
MANY_LAYERS = 4096  # longer arrays are vocabularies
F16 = 2  # bytes
# Attention that keeps less than every token's keys and values, each in a way of its own.
SPARING = ("attention.sliding_window", "attention.kv_lora_rank", "ssm.state_size")


def least_memory(file: Path, tokens: int) -> int:
    """The bytes that a model takes at least: its weights, and what it keeps of so many tokens.

    For architectures that keep less than every layer's keys and values, the weights only.

    Args:
        file: The GGUF file.
        tokens: Tokens of all the conversations at once.
    """
    return file.stat().st_size + tokens * _bytes_per_token(_read(file))


def text_limits(file: Path) -> tuple[int | None, int | None]:
    """Of a model: the numbers of a token's vector, and the tokens that it was made for; None where the file
    does not tell.

    Args:
        file: The GGUF file.
    """
    metadata = _read(file)
    architecture = metadata.get("general.architecture")
    found = [metadata.get(f"{architecture}.{key}") for key in ("embedding_length", "context_length")]
    dimensions, tokens = (number if isinstance(number, int) else None for number in found)
    return dimensions, tokens


def _bytes_per_token(metadata: Metadata) -> int:
    architecture = metadata.get("general.architecture")
    if any(f"{architecture}.{key}" in metadata for key in SPARING):
        return 0

    def number(key: str, default: int = 0) -> int:
        value = metadata.get(f"{architecture}.{key}")
        return value if isinstance(value, int) else default

    heads = number("attention.head_count")
    head_size = number("embedding_length") // heads if heads else 0
    size = number("attention.key_length", head_size) + number("attention.value_length", head_size)
    by_layer = metadata.get(f"{architecture}.attention.head_count_kv")
    kv_heads = (
        sum(by_layer)
        if isinstance(by_layer, list)
        else number("block_count") * number("attention.head_count_kv", heads)
    )
    return kv_heads * size * F16


def _read(file: Path) -> Metadata:
    """The metadata, without the vocabulary; of a damaged file as much as can be read."""
    metadata: dict[str, Value] = {}
    with (
        file.open("rb") as content,
        mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as data,
        suppress(struct.error, UnicodeDecodeError, IndexError),
    ):
        reader = _Reader(data)
        for _ in range(reader.start()):
            key = reader.text()
            if (value := reader.value()) is not None:
                metadata[key] = value
    return metadata


class _Reader:
    """Reads a header from its beginning."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def start(self) -> int:
        """Skip magic, version and number of tensors; the number of keys."""
        self._at = 4 + 4 + 8
        return int(self._number("Q"))

    def text(self) -> str:
        """A string."""
        return self._bytes(int(self._number("Q"))).decode()

    def value(self) -> Value | None:
        """A value; None for an array that does not tell about layers."""
        kind = self._number("I")
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            return self._array()
        return self._number(_code(int(kind)))

    def _array(self) -> list[int] | None:
        kind, count = int(self._number("I")), int(self._number("Q"))
        if kind == STRING:
            for _ in range(count):
                self._bytes(int(self._number("Q")))
            return None
        code = _code(kind)
        if count > MANY_LAYERS or code not in INTEGERS:
            self._bytes(count * struct.calcsize(code))
            return None
        return [int(self._number(code)) for _ in range(count)]

    def _number(self, code: str) -> int | float:
        number: int | float = struct.unpack_from("<" + code, self._data, self._at)[0]
        self._at += struct.calcsize("<" + code)
        return number

    def _bytes(self, count: int) -> bytes:
        """So many bytes, of which a file that ends before them has none."""
        if self._at + count > len(self._data):
            raise IndexError
        self._at += count
        return self._data[self._at - count : self._at]


def _code(kind: int) -> str:
    """A number's type in `struct`'s terms."""
    if kind not in SCALARS:
        raise IndexError  # nothing behind it can be found
    return SCALARS[kind]
