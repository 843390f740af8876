"""What a running server tells its owner's commands, without a key."""

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from upchatty.app import running_address
from upchatty.settings import Settings

PROBE_SECONDS = 5.0


class RunningServer:
    """The server that works on a data folder, if there is one.

    Args:
        settings: The settings, which name the folder.
    """

    def __init__(self, settings: Settings) -> None:
        # To look is not to make the folder.
        self.address = running_address(settings) if settings.data_dir.is_dir() else None

    async def state(self) -> str:
        """Whether it runs and is ready, in words."""
        if self.address is None:
            return "not running"
        answer = await self._get("/health/ready")
        if answer is None:
            return "not answering"
        return "ready" if answer[0] == 200 else "not ready"

    async def loaded_models(self) -> list[str] | None:
        """The models that it has in memory; None where there is nobody to tell."""
        answer = await self._get("/metrics") if self.address else None
        if answer is None or answer[0] != 200:
            return None
        return [
            sample.labels["model"]
            for family in text_string_to_metric_families(answer[1])
            if family.name == "upchatty_model_loaded"
            for sample in family.samples
            if sample.value
        ]

    async def _get(self, path: str) -> tuple[int, str] | None:
        """Status and body; None where it does not answer."""
        timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS)
        try:
            async with (
                aiohttp.ClientSession(timeout=timeout) as session,
                session.get(f"{self.address}{path}") as response,
            ):
                return response.status, await response.text()
        except (aiohttp.ClientError, TimeoutError):
            return None
