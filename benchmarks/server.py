"""`upchatty serve` that also says where its engine is, so that the engine can be called directly."""

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from upchatty.app import Running, run_server
from upchatty.cli.progress import RichProgress
from upchatty.engines.client import EngineClient
from upchatty.settings import Settings

KEY = "upchatty_benchmark_key"


class Address(msgspec.Struct):
    """Where the server and its engine are."""

    api: str
    chatbot: str
    engine: str
    engine_key: str
    pid: int


class ServerUnderTest:
    """The server in a process of its own.

    Args:
        folder: Where its data go.
        settings: Further settings.
        model: Settings of the default model to change, such as `{"speculation": "off"}`.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object] | None = None, **model: Any) -> None:
        self._arguments = [
            str(folder),
            *(msgspec.json.encode(part).decode() for part in (model, settings or {})),
        ]

    async def __aenter__(self) -> Address:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "benchmarks.server",
            *self._arguments,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert self._process.stdout
        return msgspec.json.decode(await self._process.stdout.readline(), type=Address)

    async def __aexit__(self, *_: object) -> None:
        self._process.terminate()
        await self._process.wait()


def main() -> None:
    folder = Path(sys.argv[1])
    model, further = (msgspec.json.decode(argument, type=dict[str, Any]) for argument in sys.argv[2:])
    engine: dict[str, str] = {}
    original = EngineClient.__init__

    def remembering(self: EngineClient, base_url: str, *arguments: Any, **keywords: Any) -> None:
        engine.update(engine=base_url, engine_key=arguments[1])
        original(self, base_url, *arguments, **keywords)

    EngineClient.__init__ = remembering  # type: ignore[method-assign]
    default = msgspec.to_builtins(Settings().model_settings["default"])
    models = {"default": default | model}
    settings = Settings(port=0, data_dir=folder, admin_key=KEY, models=models, **further)

    def announce(running: Running) -> None:
        address = Address(running.address + "/api/v1", running.chatbot.id, pid=os.getpid(), **engine)
        print(msgspec.json.encode(address).decode(), flush=True)

    uvloop.run(run_server(settings, announce, RichProgress()))


if __name__ == "__main__":
    main()
