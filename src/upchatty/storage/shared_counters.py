"""Counters in Redis or Valkey, which several servers share.

A lease ends by itself unless it is renewed, so that a server that was killed holds nothing for long.
The client's library takes tens of megabytes, so this module is only imported where it is needed.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress

import redis.asyncio
import structlog
from limits.aio.storage import RedisStorage
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from upchatty.errors import ConfigurationError, LimitsUnavailable
from upchatty.storage.counters import Counters, Leases

SCHEMES = {"redis": "redis", "rediss": "rediss", "valkey": "redis", "valkeys": "rediss"}
PREFIX = "upchatty"
TIMEOUT_SECONDS = 1.0  # of one command
GIVE_UP_SECONDS = 2.0  # of all commands for one request
CONNECTIONS = 32
LEASE_SECONDS = 30
RENEWAL_SECONDS = 10.0

TAKE = """
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
local others = redis.call('ZRANGE', KEYS[1], 0, -1)
local tokens = 0
for _, lease in ipairs(others) do
    tokens = tokens + tonumber(string.match(lease, ':(%d+)$'))
end
redis.call('ZADD', KEYS[1], now + ARGV[2], ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[2])
return {#others, tokens}
"""
RENEW = """
local time = redis.call('TIME')
redis.call('ZADD', KEYS[1], tonumber(time[1]) + ARGV[2], ARGV[1])
redis.call('EXPIRE', KEYS[1], ARGV[2])
"""

log = structlog.get_logger()


class SharedCounters(Counters):
    """Counters in Redis or Valkey, for several servers.

    Args:
        url: `redis://[user:password@]host:port/number`, with `rediss` for TLS, or `valkey`, `valkeys`.

    Raises:
        ConfigurationError: It is no such URL.
    """

    def __init__(self, url: str) -> None:
        scheme, separator, rest = url.partition("://")
        try:
            address = SCHEMES[scheme] + separator + rest
            pool = redis.asyncio.BlockingConnectionPool.from_url(
                address,
                max_connections=CONNECTIONS,
                timeout=TIMEOUT_SECONDS,
                socket_timeout=TIMEOUT_SECONDS,
                socket_connect_timeout=TIMEOUT_SECONDS,
                retry=Retry(NoBackoff(), 1),  # a kept connection may have been closed meanwhile
            )
        except (KeyError, ValueError):
            raise ConfigurationError(
                setting="limits_url", problem="expected redis://HOST:PORT/NUMBER or valkey://HOST:PORT/NUMBER"
            ) from None
        self._client = redis.asyncio.Redis(connection_pool=pool)
        super().__init__(
            RedisStorage(
                f"async+{address}",
                implementation="redispy",
                key_prefix=PREFIX,
                connection_pool=pool,  # type: ignore[arg-type]  # it says so in its docstring
            )
        )
        self._take = self._client.register_script(TAKE)
        self._renew = self._client.register_script(RENEW)
        self._held: dict[tuple[str, str], int] = {}
        self._renewer: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def _guarded(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(GIVE_UP_SECONDS):
                yield
        except (RedisError, OSError, TimeoutError) as error:
            log.error("the limits' counters cannot be reached", problem=str(error) or type(error).__name__)
            raise LimitsUnavailable from error

    def guarded(self) -> AbstractAsyncContextManager[None]:
        return self._guarded()

    async def begin_period(self, name: str, amount: int, seconds: int) -> None:
        if amount:  # atomic: another server may begin it at the same time
            await self._client.set(f"{PREFIX}:{name}", amount, nx=True, ex=seconds)

    async def take(self, owner: str, lease: str, tokens: int) -> Leases:
        self._hold(owner, lease, tokens)
        return Leases(*await self._take([_leases(owner)], [f"{lease}:{tokens}", LEASE_SECONDS]))

    async def lower(self, owner: str, lease: str, tokens: int) -> None:
        before = self._held[owner, lease]
        self._hold(owner, lease, tokens)
        if tokens != before:
            await self._renew([_leases(owner)], [f"{lease}:{tokens}", LEASE_SECONDS])
            await self._client.zrem(_leases(owner), f"{lease}:{before}")

    async def release(self, owner: str, lease: str) -> None:
        if (tokens := self._held.pop((owner, lease), None)) is not None:
            await self._client.zrem(_leases(owner), f"{lease}:{tokens}")

    async def close(self) -> None:
        if self._renewer:
            self._renewer.cancel()
            with suppress(asyncio.CancelledError):
                await self._renewer
        await self._client.connection_pool.disconnect()

    def _hold(self, owner: str, lease: str, tokens: int) -> None:
        self._held[owner, lease] = tokens
        if self._renewer is None:
            self._renewer = asyncio.create_task(self._renew_leases())

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(RENEWAL_SECONDS)
            for (owner, lease), tokens in list(self._held.items()):
                with suppress(LimitsUnavailable):
                    async with self.guarded():
                        await self._renew([_leases(owner)], [f"{lease}:{tokens}", LEASE_SECONDS])
                if self._held.get((owner, lease)) != tokens:  # ended meanwhile, and must not come back
                    with suppress(LimitsUnavailable):
                        async with self.guarded():
                            await self._client.zrem(_leases(owner), f"{lease}:{tokens}")


def _leases(owner: str) -> str:
    return f"{PREFIX}:leases:{owner}"
