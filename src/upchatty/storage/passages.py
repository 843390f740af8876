"""Passages of documents: what is searched, and the two indexes that candidates come from."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from sqlalchemy import (
    ARRAY,
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Row,
    RowMapping,
    Select,
    Text,
    TextClause,
    any_,
    bindparam,
    delete,
    exists,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from upchatty.storage.database import Database
from upchatty.storage.tables import chatbots, documents, passage_terms, passage_totals, passages
from upchatty.storage.vector_type import vector_text

Values = dict[str, Any]
NUMBER_SHIFT = 32  # a passage's id: its chatbot's number, and its own number below
INDEX_LOCK = 0x7570636B  # any will do, if every process takes the same one
IDS_OF_A_PAGE = 10_000
NEIGHBOURS_SEEN = 200  # by HNSW, to find the nearest hundred among them


@dataclass(frozen=True, slots=True)
class NewPassage:
    """A passage of a document that is being published.

    Args:
        position: Its place in the document, from 0.
        headings: The path of headings above it.
        page: The page on which it begins, from 1, where the document has pages.
        anchor: What follows `#` in a URL that leads to it, where there is one.
        text: The passage.
        terms: What it is found by: the terms of headings and text, separated by one space each, in their
            order and repeated as they occur (`knowledge.words`).
        tokens: The embedding model's tokens of headings and text.
        hash: Of headings and text, in hex: passages of a document with the same one are the same.
        embedding: float16, little-endian, of length 1; None where the document has a passage with this
            hash and this embedding model already.
    """

    position: int
    headings: list[str]
    page: int | None
    anchor: str | None
    text: str
    terms: str
    tokens: int
    hash: str
    embedding: bytes | None


class Totals(NamedTuple):
    """A chatbot's passages as a whole.

    Args:
        number: The upper half of their ids.
        passages: How many there are.
        length: Their terms, all together.
        revision: Changes with everything that is published or removed.
        removed: Counts the passages that were removed.
    """

    number: int
    passages: int
    length: int
    revision: int
    removed: int


def term_codes(terms: Sequence[str]) -> bytes:
    """Terms as numbers of 32 bits, little-endian: among the terms of a hundred passages, hardly ever are two
    of them the same one."""
    return np.array([crc32(term.encode()) for term in terms], "<u4").tobytes()


async def any_passages(database: Database) -> bool:
    """Whether any chatbot has passages."""
    async with database.transaction() as connection:
        return bool(await connection.scalar(select(exists(select(passages.c.id)))))


async def embedded_hashes(database: Database, document_id: str, embedding_model: str) -> set[str]:
    """The hashes of a document's passages that need not be embedded again with this model."""
    query = select(passages.c.hash).where(
        passages.c.document_id == document_id,
        passages.c.embedding_model == embedding_model,
        passages.c.embedding.is_not(None),
    )
    async with database.transaction() as connection:
        return set((await connection.execute(query)).scalars())


async def publish(
    database: Database,
    document_id: str,
    chatbot_id: str,
    *,
    passages: list[NewPassage],
    embedding_model: str,
    document: Values | None = None,
) -> bool:
    """Replace a document's passages by these, all at once. Those whose hash and embedding model stay keep
    their row.

    Args:
        database: Where it is stored.
        document_id: The document.
        chatbot_id: Its chatbot.
        passages: All passages of the new version, in their order.
        embedding_model: What made the embeddings: the model's fingerprint.
        document: Values for the document's own columns, changed at the same moment.

    Returns:
        Whether the document is still there; if not, nothing is stored.
    """
    await _ensure_vector_index(database, passages)
    async with database.transaction() as connection:
        if not await _lock(connection, chatbot_id, document_id):
            return False
        number, revision, last_id = await _next_revision(connection, chatbot_id, len(passages))
        kept, added = await _compare(connection, document_id, passages, embedding_model)
        await _remove_others(connection, document_id, [row["passage_id"] for row in kept])
        first_id = max(last_id - len(passages), number << NUMBER_SHIFT) + 1
        rows = [
            _row(new, embedding)
            | {
                "id": first_id + index,
                "chatbot_id": chatbot_id,
                "document_id": document_id,
                "revision": revision,
                "embedding_model": embedding_model,
            }
            for index, (new, embedding) in enumerate(added)
        ]
        await _write(connection, kept, rows)
        if document:
            await connection.execute(update(documents).where(documents.c.id == document_id).values(document))
    return True


def statistics(
    connection: Connection, chatbot_id: str, terms: Sequence[str]
) -> tuple[Totals | None, dict[str, int]]:
    """A chatbot's totals, None where nothing was ever published, and in how many passages terms occur."""
    rows = connection.execute(*_statistics.among(connection, terms, chatbot=chatbot_id)).all()
    if not rows:
        return None, {}
    return Totals(*rows[0][:5]), {row.term: row.occurs_in for row in rows if row.term is not None}


def lexical_candidates(
    connection: Connection, number: int, terms: dict[str, int], most: int, limit: int
) -> list[int]:
    """The ids of the passages that have the weightiest terms.

    Args:
        connection: The connection.
        number: The chatbot's number.
        terms: The terms of which a passage must have one, with their weights.
        most: How many passages of a term are looked at.
        limit: How many are wanted at most.
    """
    is_sqlite = connection.dialect.name == "sqlite"
    low, high = number << NUMBER_SHIFT, (number + 1) << NUMBER_SHIFT
    parameters: Values = {"limit": limit, "most": most, "low": low, "high": high}
    for index, (term, weight) in enumerate(terms.items()):
        match = f'"{term}"' if is_sqlite else f"'{number}:{term}'"
        parameters |= {f"match{index}": match, f"weight{index}": weight}
    query = _lexical_query(_SQLITE_PART if is_sqlite else _POSTGRESQL_PART, len(terms))
    return list(connection.execute(query, parameters).scalars())


@cache
def _lexical_query(part: str, count: int) -> TextClause:
    parts = " UNION ALL ".join(part.format(index=index) for index in range(count))
    return text(f"SELECT id FROM ({parts}) AS found GROUP BY id ORDER BY SUM(weight) DESC, id LIMIT :limit")


def nearest(
    connection: Connection,
    chatbot_id: str,
    embedding: bytes,
    embedding_model: str,
    *,
    limit: int,
    exact: bool,
) -> list[int]:
    """The ids of the passages nearest to an embedding; on PostgreSQL only.

    Args:
        connection: The connection.
        chatbot_id: The chatbot.
        embedding: float16 bytes.
        embedding_model: The model that made it and the passages' ones.
        limit: How many at most.
        exact: Whether to compare it with every passage rather than to use the index.
    """
    dimensions = len(embedding) // 2
    if exact:
        distance, size = "embedding <#> CAST(CAST(:vector AS text) AS halfvec)", ""
    else:
        connection.execute(_PREPARE_HNSW)
        vector = f"CAST(CAST(:vector AS text) AS halfvec({dimensions}))"
        distance = f"(embedding::halfvec({dimensions})) <#> {vector}"
        size = f"AND vector_dims(embedding) = {dimensions}"
    query = text(
        "SELECT id FROM passages WHERE chatbot_id = :chatbot AND embedding_model = :model"
        f" AND embedding IS NOT NULL {size} ORDER BY {distance} LIMIT :limit"
    )
    parameters = {
        "chatbot": chatbot_id,
        "model": embedding_model,
        "vector": vector_text(embedding),
        "limit": limit,
    }
    return list(connection.execute(query, parameters).scalars())


def get_scored_columns(
    connection: Connection, ids: Sequence[int]
) -> Sequence[Row[int, bytes, str, bytes | None]]:
    """What scores of passages are made from: id, term codes, embedding model and embedding. Those that are
    gone are left out."""
    return connection.execute(*_scored_columns.among(connection, ids)).all()


def get_passages(connection: Connection, ids: Sequence[int]) -> dict[int, RowMapping]:
    """Passages by id, with their documents' titles and URLs; those that are gone are left out."""
    rows = connection.execute(*_passages.among(connection, ids)).mappings()
    return {row["id"]: row for row in rows}


def embeddings_after(
    connection: Connection,
    chatbot_id: str,
    embedding_model: str,
    place: tuple[int, int],
    limit: int,
) -> Sequence[Row[int, int, bytes]]:
    """Embeddings in the order in which they were published.

    Args:
        connection: The connection.
        chatbot_id: The chatbot.
        embedding_model: The model that made them.
        place: The revision and the id after which to begin.
        limit: How many at most.

    Returns:
        Rows of revision, id and embedding.
    """
    revision, passage_id = place
    query = (
        select(passages.c.revision, passages.c.id, passages.c.embedding)
        .where(
            passages.c.chatbot_id == chatbot_id,
            passages.c.revision >= revision,
            (passages.c.revision > revision) | (passages.c.id > passage_id),
            passages.c.embedding_model == embedding_model,
            passages.c.embedding.is_not(None),
        )
        .order_by(passages.c.revision, passages.c.id)
        .limit(limit)
    )
    return connection.execute(query).all()


def passage_ids(connection: Connection, chatbot_id: str, after: int = 0) -> list[int]:
    """The ids of a chatbot's passages in their order, a page of them after an id."""
    query = (
        select(passages.c.id)
        .where(passages.c.chatbot_id == chatbot_id, passages.c.id > after)
        .order_by(passages.c.id)
        .limit(IDS_OF_A_PAGE)
    )
    return list(connection.execute(query).scalars())


class _Among:
    """A query for rows whose column is among given values, which go to the database as one parameter.

    Args:
        column: The column.
        kind: Its type.
        build: The query, given the condition.
    """

    def __init__(
        self, column: Column[Any], kind: type[Any], build: Callable[[ColumnElement[bool]], Select[Any]]
    ) -> None:
        on_sqlite = func.json_each(bindparam("among")).table_valued("value")
        self._on_sqlite = build(column.in_(select(on_sqlite.c.value)))
        self._on_postgresql = build(column == any_(bindparam("among", type_=ARRAY(kind))))

    def among(
        self, connection: Connection, values: Sequence[Any], **parameters: Any
    ) -> tuple[Select[Any], Values]:
        """The query and its parameters."""
        if connection.dialect.name == "sqlite":
            return self._on_sqlite, parameters | {"among": json.dumps(values)}
        return self._on_postgresql, parameters | {"among": values}


# These are built once: building a query takes longer than executing it.
_scored_columns = _Among(
    passages.c.id,
    BigInteger,
    select(
        passages.c.id,
        passages.c.term_codes,
        passages.c.embedding_model,
        passages.c.embedding,
    ).where,
)
_passages = _Among(
    passages.c.id,
    BigInteger,
    select(
        passages.c.id,
        passages.c.document_id,
        passages.c.headings,
        passages.c.page,
        passages.c.anchor,
        passages.c.text,
        passages.c.tokens,
        documents.c.title,
        documents.c.url,
    )
    .join_from(passages, documents, documents.c.id == passages.c.document_id)
    .where,
)
_statistics = _Among(
    passage_terms.c.term,
    Text,
    lambda is_wanted: (
        select(
            passage_totals.c.number,
            passage_totals.c.passages,
            passage_totals.c.length,
            passage_totals.c.revision,
            passage_totals.c.removed,
            passage_terms.c.term,
            passage_terms.c.passages.label("occurs_in"),
        )
        .outerjoin_from(
            passage_totals,
            passage_terms,
            (passage_terms.c.chatbot_id == passage_totals.c.chatbot_id) & is_wanted,
        )
        .where(passage_totals.c.chatbot_id == bindparam("chatbot"))
    ),
)
_SQLITE_PART = (
    "SELECT * FROM (SELECT rowid AS id, :weight{index} AS weight FROM passage_index"
    " WHERE passage_index MATCH :match{index} AND rowid > :low AND rowid < :high LIMIT :most)"
)
_POSTGRESQL_PART = (
    "(SELECT id, CAST(:weight{index} AS integer) AS weight FROM passages"
    " WHERE passage_lexemes(id, terms) @@ CAST(CAST(:match{index} AS text) AS tsquery)"
    " AND id > :low AND id < :high LIMIT :most)"
)
# With other chatbots' passages in the same index, it is read on until there are enough of this one's.
_PREPARE_HNSW = text(
    f"SELECT set_config('hnsw.ef_search', '{NEIGHBOURS_SEEN}', true),"
    " set_config('hnsw.iterative_scan', 'relaxed_order', true)"
)


async def _ensure_vector_index(database: Database, new: list[NewPassage]) -> None:
    """Make PostgreSQL's index for vectors of this size, which is done when there are none yet."""
    sizes = {len(passage.embedding) // 2 for passage in new if passage.embedding}
    for size in sizes:
        name = f"ix_passages_embedding_{size}"
        async with database.transaction() as connection:
            if connection.dialect.name != "postgresql":
                return
            if await connection.scalar(text("SELECT to_regclass(:name)"), {"name": name}):
                continue
            await connection.execute(select(func.pg_advisory_xact_lock(INDEX_LOCK)))
            await connection.execute(
                text(
                    f"CREATE INDEX IF NOT EXISTS {name} ON passages"
                    f" USING hnsw ((embedding\\:\\:halfvec({size})) halfvec_ip_ops)"
                    f" WHERE vector_dims(embedding) = {size}"
                )
            )


async def _lock(connection: AsyncConnection, chatbot_id: str, document_id: str) -> bool:
    """Lock in the order in which a removal does, so that none waits for the other."""
    chatbot = (
        select(chatbots.c.id).where(chatbots.c.id == chatbot_id).with_for_update(read=True, key_share=True)
    )
    if await connection.scalar(chatbot) is None:
        return False
    locked = await connection.execute(
        update(documents)
        .where(documents.c.id == document_id, documents.c.chatbot_id == chatbot_id)
        .values(chatbot_id=chatbot_id)
    )
    return locked.rowcount > 0


async def _next_revision(connection: AsyncConnection, chatbot_id: str, count: int) -> tuple[int, int, int]:
    """The chatbot's number, its new revision, and the last of the ids that are taken for new passages."""
    while True:
        counted = await connection.execute(
            update(passage_totals)
            .where(passage_totals.c.chatbot_id == chatbot_id)
            .values(revision=passage_totals.c.revision + 1, last_id=passage_totals.c.last_id + count)
            .returning(passage_totals.c.number, passage_totals.c.revision, passage_totals.c.last_id)
        )
        if row := counted.one_or_none():
            return row.number, row.revision, row.last_id
        await _add_totals(connection, chatbot_id)


async def _add_totals(connection: AsyncConnection, chatbot_id: str) -> None:
    if connection.dialect.name == "postgresql":
        await connection.execute(select(func.pg_advisory_xact_lock(INDEX_LOCK)))
    exists = select(passage_totals.c.number).where(passage_totals.c.chatbot_id == chatbot_id)
    if await connection.scalar(exists) is not None:
        return
    number = await connection.scalar(select(func.coalesce(func.max(passage_totals.c.number), 0) + 1))
    await connection.execute(
        insert(passage_totals).values(
            chatbot_id=chatbot_id, number=number, last_id=(number or 1) << NUMBER_SHIFT
        )
    )


async def _compare(
    connection: AsyncConnection, document_id: str, new: list[NewPassage], embedding_model: str
) -> tuple[list[Values], list[tuple[NewPassage, bytes | None]]]:
    """Which of the stored passages stay, at which place, and which are to be added."""
    query = select(passages.c.id, passages.c.hash).where(
        passages.c.document_id == document_id, passages.c.embedding_model == embedding_model
    )
    stored: dict[str, list[int]] = {}
    for row in await connection.execute(query.order_by(passages.c.position)):
        stored.setdefault(row.hash, []).append(row.id)
    known = {hash_: ids[0] for hash_, ids in stored.items()}
    kept: list[Values] = []
    added: list[NewPassage] = []
    for passage in new:
        if ids := stored.get(passage.hash):
            kept.append(_place(passage) | {"passage_id": ids.pop(0)})
        else:
            added.append(passage)
    copied = {passage.hash: known[passage.hash] for passage in added if passage.hash in known}
    found = await _embeddings(connection, list(copied.values()))
    given = {passage.hash: passage.embedding for passage in new if passage.embedding}
    given |= {hash_: found[passage_id] for hash_, passage_id in copied.items()}
    return kept, [(passage, passage.embedding or given.get(passage.hash)) for passage in added]


async def _embeddings(connection: AsyncConnection, ids: list[int]) -> dict[int, bytes]:
    if not ids:
        return {}
    query = select(passages.c.id, passages.c.embedding).where(passages.c.id.in_(ids))
    return {row.id: row.embedding for row in await connection.execute(query)}


async def _remove_others(connection: AsyncConnection, document_id: str, kept: list[int]) -> None:
    ids = select(passages.c.id).where(passages.c.document_id == document_id)
    gone = sorted(set((await connection.execute(ids)).scalars()).difference(kept))
    for begin in range(0, len(gone), 10_000):  # a statement takes 32,766 values at most
        await connection.execute(delete(passages).where(passages.c.id.in_(gone[begin : begin + 10_000])))


async def _write(connection: AsyncConnection, kept: list[Values], added: list[Values]) -> None:
    if kept:
        changed = update(passages).where(passages.c.id == bindparam("passage_id"))
        await connection.execute(changed, kept)
    if added:
        await connection.execute(insert(passages), added)


def _place(passage: NewPassage) -> Values:
    return {"position": passage.position, "page": passage.page, "anchor": passage.anchor}


def _row(passage: NewPassage, embedding: bytes | None) -> Values:
    return _place(passage) | {
        "headings": passage.headings,
        "text": passage.text,
        "terms": passage.terms,
        "length": passage.terms.count(" ") + bool(passage.terms),
        "term_codes": term_codes(passage.terms.split()),
        "tokens": passage.tokens,
        "hash": passage.hash,
        "embedding": embedding,
    }
