"""Queries on keys."""

from typing import Any

from sqlalchemy import RowMapping, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from upchatty.storage.database import Database
from upchatty.storage.tables import keys


async def add_key(database: Database, key: dict[str, Any]) -> bool:
    """Store a key.

    Returns:
        Whether it is new: False where a key with this hash exists already.
    """
    try:
        async with database.transaction() as connection:
            await connection.execute(insert(keys).values(key))
    except IntegrityError:
        return False
    return True


async def find_key(database: Database, key_hash: str) -> RowMapping | None:
    """The key with this hash, revoked and expired ones included."""
    async with database.transaction() as connection:
        return (
            (await connection.execute(select(keys).where(keys.c.hash == key_hash))).mappings().one_or_none()
        )


async def list_keys(database: Database, *, after: str = "", limit: int | None = None) -> list[RowMapping]:
    """The keys that are not revoked, in the order of their making."""
    query = (
        select(keys).where(keys.c.id > after, keys.c.revoked_at.is_(None)).order_by(keys.c.id).limit(limit)
    )
    async with database.transaction() as connection:
        return list((await connection.execute(query)).mappings())


async def count_keys(database: Database) -> int:
    """How many keys were ever made, revoked ones included."""
    async with database.transaction() as connection:
        return (await connection.execute(select(func.count()).select_from(keys))).scalar_one()


async def restore_key(database: Database, key_id: str) -> None:
    """Take back a key's revocation, expiry and limits, and make it an admin key."""
    async with database.transaction() as connection:
        await connection.execute(
            update(keys)
            .where(keys.c.id == key_id)
            .values(revoked_at=None, expires_at=None, limits=None, scope="admin")
        )


async def revoke_key(database: Database, key_id: str, revoked_at: int) -> bool:
    """Revoke a key.

    Returns:
        Whether there was one that was not revoked yet.
    """
    async with database.transaction() as connection:
        changed = await connection.execute(
            update(keys).where(keys.c.id == key_id, keys.c.revoked_at.is_(None)).values(revoked_at=revoked_at)
        )
        return changed.rowcount > 0


async def revoke_keys_named(database: Database, name: str, *, but_hash: str, revoked_at: int) -> None:
    """Revoke the keys of this name, except the one with this hash."""
    async with database.transaction() as connection:
        await connection.execute(
            update(keys)
            .where(keys.c.name == name, keys.c.hash != but_hash, keys.c.revoked_at.is_(None))
            .values(revoked_at=revoked_at)
        )
