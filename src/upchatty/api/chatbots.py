"""Chatbots over HTTP, for owners; and OpenAI's model list, for callers."""

from typing import Annotated, Any, Literal

import msgspec
from litestar import delete, get, patch, post
from litestar.params import Parameter
from msgspec import UNSET, Meta, Struct, UnsetType

from upchatty.api.body import NO_NUL, JSONRequest
from upchatty.api.errors import with_errors
from upchatty.api.limits import NewChatbotLimits
from upchatty.api.paging import DEFAULT_PAGE_SIZE, After, Page, PageSize, page_of
from upchatty.api.services import Services
from upchatty.chat.chatbots import Chatbot, Policy
from upchatty.errors import Forbidden
from upchatty.limits import ChatbotLimits

WITHOUT_NUL = {"pattern": NO_NUL}
Name = Annotated[str, Meta(min_length=1, max_length=200, extra_json_schema=WITHOUT_NUL)]
Instructions = Annotated[str, Meta(max_length=1_000_000, extra_json_schema=WITHOUT_NUL)]
Temperature = Annotated[float, Meta(ge=0.0, le=1.0)]
MaxTokens = Annotated[int, Meta(ge=1, le=1_000_000)]
Threshold = Annotated[float, Meta(ge=0.0, le=1.0)]
FallbackMessage = Annotated[str, Meta(min_length=1, max_length=10_000, extra_json_schema=WITHOUT_NUL)]
PassageCount = Annotated[int, Meta(ge=1, le=50)]
Version = Annotated[int, Meta(ge=1, le=1_000_000)]
ChatbotId = Annotated[str, Parameter(description="`bot_…`")]
VersionNumber = Annotated[int, Parameter(ge=0, le=1_000_000_000)]
ALL_CHATBOTS = 10_000  # OpenAI's model list has no pages


class NewChatbot(Struct, forbid_unknown_fields=True, kw_only=True):
    """A chatbot to make. What is absent or null takes the default."""

    name: Name
    instructions: Instructions | None = None
    model: str | None = None
    temperature: Temperature | None = None
    max_tokens: MaxTokens | None = None
    keep_text: bool | None = None
    policy: Policy | None = None
    """`grounded`: answers from its documents only; where they have nothing that fits, it says the fallback
    message."""
    threshold: Threshold | None = None
    """The score that passages have to reach; null: the default."""
    fallback_message: FallbackMessage | None = None
    passages: PassageCount | None = None
    """How many passages an answer is given at most; null: the default."""
    limits: NewChatbotLimits | None = None
    """How much all callers together may use; null: any amount."""


class ChatbotChange(Struct, forbid_unknown_fields=True, kw_only=True):
    """What to change; null takes the default again. `published_version` goes back to a version, before
    the other changes are made."""

    name: Name | UnsetType = UNSET
    instructions: Instructions | None | UnsetType = UNSET
    model: str | None | UnsetType = UNSET
    temperature: Temperature | None | UnsetType = UNSET
    max_tokens: MaxTokens | None | UnsetType = UNSET
    keep_text: bool | None | UnsetType = UNSET
    policy: Policy | None | UnsetType = UNSET
    threshold: Threshold | None | UnsetType = UNSET
    fallback_message: FallbackMessage | None | UnsetType = UNSET
    passages: PassageCount | None | UnsetType = UNSET
    limits: NewChatbotLimits | None | UnsetType = UNSET
    """All of them: what is absent in it is not limited any more."""
    published_version: Version | UnsetType = UNSET


class ChatbotView(Struct, kw_only=True):
    """A chatbot, in one of its versions. Times are unix seconds."""

    id: str
    object: Literal["chatbot"] = "chatbot"
    version: int
    published_version: int
    name: str
    instructions: str
    model: str | None
    temperature: float
    max_tokens: int
    keep_text: bool
    policy: Policy
    threshold: float | None
    fallback_message: str | None
    passages: int | None
    limits: ChatbotLimits | None
    created_at: int
    updated_at: int

    @classmethod
    def of(cls, chatbot: Chatbot) -> "ChatbotView":
        """The chatbot as the contract has it."""
        fields = {name: value for name, value in chatbot._asdict().items() if name in cls.__struct_fields__}
        times = {"created_at": chatbot.created_at // 1000, "updated_at": chatbot.updated_at // 1000}
        return cls(**fields | times)


class ModelView(Struct, kw_only=True):
    """A chatbot as OpenAI's clients list models."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["upchatty"] = "upchatty"

    @classmethod
    def of(cls, chatbot: Chatbot) -> "ModelView":
        """The chatbot as OpenAI has models."""
        return cls(id=chatbot.id, created=chatbot.created_at // 1000)


@get("/models", responses=with_errors())
async def list_models(request: JSONRequest, services: Services) -> Page[ModelView]:
    """The chatbots that this key may call."""
    chatbots = await services.chatbots.page(limit=ALL_CHATBOTS, only=request.user.callable_chatbots)
    return page_of([ModelView.of(chatbot) for chatbot in chatbots], ALL_CHATBOTS)


@get("/models/{model:str}", responses=with_errors(404))
async def get_model(model: str, request: JSONRequest, services: Services) -> ModelView:
    """One of the chatbots that this key may call."""
    chatbot = await services.chatbots.get(model)
    if not request.user.may_call(chatbot.id):
        raise Forbidden(problem="this key does not open that chatbot")
    return ModelView.of(chatbot)


@post("/chatbots", responses=with_errors(413, 415))
async def create_chatbot(data: NewChatbot, services: Services) -> ChatbotView:
    """Make a chatbot."""
    return ChatbotView.of(await services.chatbots.create(**_given(data)))


@get("/chatbots", responses=with_errors())
async def list_chatbots(
    services: Services, limit: PageSize = DEFAULT_PAGE_SIZE, after: After = ""
) -> Page[ChatbotView]:
    """The chatbots, oldest first."""
    chatbots = await services.chatbots.page(after=after, limit=limit + 1)
    return page_of([ChatbotView.of(chatbot) for chatbot in chatbots], limit)


@get("/chatbots/{chatbot_id:str}", responses=with_errors(404))
async def get_chatbot(chatbot_id: ChatbotId, services: Services) -> ChatbotView:
    """A chatbot: its published version, or with `@3` behind the id that one."""
    return ChatbotView.of(await services.chatbots.get(chatbot_id))


@get("/chatbots/{chatbot_id:str}/versions", responses=with_errors(404))
async def list_versions(
    chatbot_id: ChatbotId, services: Services, limit: PageSize = DEFAULT_PAGE_SIZE, after: VersionNumber = 0
) -> Page[ChatbotView]:
    """A chatbot's versions, oldest first; `after` is a version's number."""
    versions = await services.chatbots.versions(chatbot_id, after=after, limit=limit + 1)
    return page_of([ChatbotView.of(version) for version in versions], limit)


@patch("/chatbots/{chatbot_id:str}", responses=with_errors(404, 413, 415))
async def change_chatbot(chatbot_id: ChatbotId, data: ChatbotChange, services: Services) -> ChatbotView:
    """Change a chatbot, which makes and publishes its next version; or publish an earlier one."""
    changes = _given(data)
    if version := changes.pop("published_version", None):
        await services.chatbots.publish(chatbot_id, version)
    return ChatbotView.of(await services.chatbots.change(chatbot_id, **changes))


@delete("/chatbots/{chatbot_id:str}", responses=with_errors(404))
async def delete_chatbot(chatbot_id: ChatbotId, services: Services) -> None:
    """Delete a chatbot with all it owns."""
    await services.chatbots.delete(chatbot_id)


def _given(fields: NewChatbot | ChatbotChange) -> dict[str, Any]:
    given = {name: value for name, value in msgspec.structs.asdict(fields).items() if value is not UNSET}
    if isinstance(limits := given.get("limits"), NewChatbotLimits):
        given["limits"] = limits.checked
    return given
