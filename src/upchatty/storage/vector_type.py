"""Embeddings in columns: bytes on SQLite, pgvector's `halfvec` on PostgreSQL."""

from collections.abc import Callable
from typing import Any

import numpy as np
from sqlalchemy import BindParameter, Dialect, LargeBinary, Text, cast, func
from sqlalchemy.sql.elements import ColumnElement
from sqlalchemy.types import TypeEngine, UserDefinedType

SENT_HEADER = 4  # bytes: the number of dimensions, and two that are not used


class _PostgresHalfVector(UserDefinedType[bytes]):
    """`halfvec`, written as text and read in its binary form, which is the quickest without a codec of
    the driver's: https://github.com/pgvector/pgvector/blob/master/src/halfvec.c (halfvec_send)."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "halfvec"

    def bind_expression(self, bindvalue: BindParameter[bytes]) -> ColumnElement[bytes]:
        return cast(cast(bindvalue, Text), self)

    def bind_processor(self, _: Dialect) -> Callable[[bytes | None], str | None]:
        return lambda value: None if value is None else vector_text(value)

    def column_expression(self, column: ColumnElement[Any]) -> ColumnElement[Any]:
        return func.halfvec_send(column, type_=_SentVector)


class _SentVector(UserDefinedType[bytes]):
    """What `halfvec_send` returns as float16 bytes."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        return "bytea"

    def result_processor(self, _: Dialect, coltype: object) -> Callable[[bytes | None], bytes | None]:
        return lambda value: None if value is None else _swapped(value[SENT_HEADER:])


HalfVector: TypeEngine[bytes] = LargeBinary().with_variant(_PostgresHalfVector(), "postgresql")
"""float16 numbers, little-endian."""


def vector_text(embedding: bytes) -> str:
    """float16 bytes as pgvector's text."""
    return "[" + ",".join(map(str, np.frombuffer(embedding, "<f2").tolist())) + "]"


def _swapped(big_endian: bytes) -> bytes:
    return np.frombuffer(big_endian, ">f2").astype("<f2").tobytes()
