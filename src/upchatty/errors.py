"""Every error that UpChatty raises on purpose.

    UpChattyError
    ├── RequestError                 what a caller of the API sees
    │   ├── InvalidRequest           400
    │   │   └── PromptTooLong        400
    │   ├── Unauthenticated          401
    │   ├── Forbidden                403
    │   ├── NotFound                 404
    │   ├── Conflict                 409
    │   ├── BodyTooLarge             413
    │   ├── UnsupportedMediaType     415
    │   │   └── UnsupportedDocument  415
    │   ├── RateLimited              429
    │   ├── InternalError            500
    │   ├── EngineFailed             502
    │   ├── EngineRefused            502
    │   ├── Unavailable              503
    │   │   ├── EngineNotReady
    │   │   ├── QueueFull
    │   │   ├── LimitsUnavailable
    │   │   └── StorageUnavailable
    │   └── EngineTimeout            504
    └── StartupError                 what an operator sees: a sentence and an exit code
        ├── ConfigurationError
        ├── DataFolderInUse
        ├── DownloadError
        └── ModelFileError

Each class owns its HTTP status, its exit code and its sentence; whoever raises it fills in the
sentence's fields.
"""

import math
from typing import ClassVar


class UpChattyError(Exception):
    """An error with one sentence for a person.

    Args:
        fields: The values for the class's `sentence`.
    """

    sentence: ClassVar[str] = "{problem}"
    exit_code: ClassVar[int] = 1

    def __init__(self, **fields: object) -> None:
        self.fields = fields
        super().__init__(self.sentence.format(**fields))


class RequestError(UpChattyError):
    """A request that cannot be answered, with its HTTP status.

    Args:
        retry_after: Seconds after which a retry may succeed, where that is known.
        fields: The values for the class's `sentence`.
    """

    status: ClassVar[int] = 500
    fixed_headers: ClassVar[dict[str, str]] = {}

    def __init__(self, *, retry_after: float | None = None, **fields: object) -> None:
        super().__init__(**fields)
        self.headers = dict(self.fixed_headers)
        self.retry_after = retry_after
        if retry_after is not None:
            self.headers["Retry-After"] = str(max(1, math.ceil(retry_after)))


class InvalidRequest(RequestError):
    """The request breaks the contract; `parameter` is where, `expected` is what would be right."""

    status = 400
    sentence = "{parameter}: {expected}"
    exit_code = 2


class PromptTooLong(InvalidRequest):
    """The newest message and the instructions alone exceed the context.

    SDKs recognise this wording up to its comma, so it stays as it is.
    """

    sentence = (
        "messages: prompt is too long: this model's maximum context length is {limit} tokens, "
        "but the newest message with the instructions takes {length}"
    )


class Unauthenticated(RequestError):
    """No key, or one that does not open anything."""

    status = 401
    fixed_headers: ClassVar[dict[str, str]] = {"WWW-Authenticate": "Bearer"}


class Forbidden(RequestError):
    """A valid key that may not do this."""

    status = 403


class NotFound(RequestError):
    """Nothing goes by this name."""

    status = 404
    sentence = "there is no {kind} {name!r}"
    exit_code = 4


class Conflict(RequestError):
    """The request contradicts what is there, and a retry can mend it."""

    status = 409


class BodyTooLarge(RequestError):
    """The body exceeds the limit."""

    status = 413
    sentence = "the body is too large: at most {limit} bytes are accepted"


class UnsupportedMediaType(RequestError):
    """The body is not in a format that this endpoint reads."""

    status = 415
    sentence = "Content-Type: expected application/json, got {got}"


class UnsupportedDocument(UnsupportedMediaType):
    """A document comes neither in JSON nor in a form."""

    sentence = "Content-Type: expected application/json or multipart/form-data, got {got}"


class RateLimited(RequestError):
    """A limit of the key or of the chatbot is reached; `Retry-After` says when there is room again."""

    status = 429


class InternalError(RequestError):
    """A defect of ours; the log has the details under the request's id."""

    status = 500
    sentence = (
        "something went wrong inside the server; the log has the details under this request's X-Request-ID"
    )


class EngineFailed(RequestError):
    """The engine broke off, or answered with something that is no answer."""

    status = 502
    sentence = "the engine failed: {problem}"


class EngineRefused(RequestError):
    """The engine does not take this request, and no other one would."""

    status = 502
    sentence = "the engine refused the request: {problem}"


class Unavailable(RequestError):
    """Not now; `Retry-After` says when to try again."""

    status = 503
    fixed_headers: ClassVar[dict[str, str]] = {"Retry-After": "1"}


class EngineNotReady(Unavailable):
    """The engine is loading its model, or is being restarted."""

    sentence = "the model {model!r} is not ready: {problem}; try again in a moment"
    exit_code = 3


class QueueFull(Unavailable):
    """More requests wait for the model than its queue holds, or one waited too long."""

    sentence = "the model {model!r} is busy: {problem}; try again in a moment"


class StorageUnavailable(Unavailable):
    """The database does not answer or cannot be written."""

    sentence = "the database is not available at the moment; the server's log has the details"


class LimitsUnavailable(Unavailable):
    """The server that keeps the counters of the limits does not answer."""

    sentence = "the limits cannot be checked at the moment; the server's log has the details"


class EngineTimeout(RequestError):
    """The engine took longer than it may."""

    status = 504
    sentence = "the engine did not answer within {seconds:g} seconds"


class StartupError(UpChattyError):
    """The server or a command cannot start; the sentence says what to do."""


class ConfigurationError(StartupError):
    """A setting is wrong."""

    sentence = "{setting}: {problem}"
    exit_code = 2


class DataFolderInUse(StartupError):
    """Another server works on the same data folder."""

    sentence = (
        "another UpChatty server is using the data folder {folder}; "
        "stop it, or start this one with another --data-dir"
    )
    exit_code = 5


class DownloadError(StartupError):
    """A model file could not be fetched."""

    sentence = "cannot download {url}: {problem}"


class ModelFileError(StartupError):
    """A model file is missing, incomplete or corrupt."""

    sentence = "the model file {path} cannot be used: {problem}"
