"""What a caller may ask: OpenAI's request, and what of it we honour.

Protocol: https://platform.openai.com/docs/api-reference/chat
"""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from upchatty.api.body import NO_NUL
from upchatty.chat.answer import Question
from upchatty.engines.dialect import Message
from upchatty.errors import InvalidRequest

Fraction = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
TokenLimit = Annotated[int, Meta(ge=1)]  # no upper limit: what is too large is cut
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Text = Annotated[str, Meta(extra_json_schema={"pattern": NO_NUL})]
StopText = Annotated[str, Meta(min_length=1)]  # an empty one would end every answer before it begins
Empty = Meta(max_length=0)
PASSED_ON = ("temperature", "top_p", "stop", "seed", "presence_penalty", "frequency_penalty")


class TextPart(Struct):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class UserMessage(Struct, tag_field="role", tag="user"):
    """What a person says."""

    content: Text | list[TextPart]


class AssistantMessage(Struct, tag_field="role", tag="assistant"):
    """What the chatbot said."""

    content: Text | list[TextPart] | None = None
    tool_calls: Annotated[list[Any], Empty] | None = None


class SystemMessage(Struct, tag_field="role", tag="system"):
    """What the caller's program adds to the chatbot's instructions."""

    content: Text | list[TextPart]


class DeveloperMessage(Struct, tag_field="role", tag="developer"):
    """The same, by OpenAI's newer name."""

    content: Text | list[TextPart]


ChatMessage = UserMessage | AssistantMessage | SystemMessage | DeveloperMessage
ROLES = {
    UserMessage: "user",
    AssistantMessage: "assistant",
    SystemMessage: "system",
    DeveloperMessage: "system",
}


class StreamOptions(Struct, kw_only=True):
    """Options of a streamed answer."""

    include_usage: bool | None = None


class JSONSchemaFormat(Struct, kw_only=True):
    """A schema that the answer follows."""

    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseFormat(Struct, kw_only=True):
    """The answer's format."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaFormat | None = None

    def for_engine(self) -> dict[str, Any]:
        """The same as plain values.

        Raises:
            InvalidRequest: There is no schema where there has to be one.
        """
        if self.type == "json_object":
            return {"type": "json_object"}
        if self.json_schema is None or self.json_schema.schema is None:
            raise InvalidRequest(
                parameter="response_format.json_schema.schema", expected="expected a JSON schema"
            )
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": self.json_schema.schema}}


class ChatCompletionRequest(Struct, kw_only=True):
    """A question to a chatbot. What it does not list is ignored."""

    model: Annotated[str, Meta(description="The chatbot's id, `bot_…`, or `bot_…@7` for its version 7")]
    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    temperature: Fraction | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: TokenLimit | None = None
    max_completion_tokens: TokenLimit | None = None
    top_p: Fraction | None = None
    stop: StopText | Annotated[list[StopText], Meta(max_length=4)] | None = None
    seed: Seed | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    response_format: ResponseFormat | None = None

    # Known parameters that would change the answer, and are not built: only their neutral values pass.
    n: Annotated[int, Meta(ge=1, le=1)] | None = None
    logprobs: Annotated[bool, Meta(extra_json_schema={"const": False})] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, Any], Empty] | None = None
    tools: Annotated[list[Any], Empty] | None = None
    functions: Annotated[list[Any], Empty] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    web_search_options: None = None

    def question(self, patience: float | None = None) -> Question:
        """The request in the domain's terms.

        Args:
            patience: Seconds that the caller waits for the first token.

        Raises:
            InvalidRequest: A parameter asks for what is not built.
        """
        if self.logprobs:
            raise InvalidRequest(parameter="logprobs", expected="log probabilities are not available")
        limits = [limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None]
        parameters = {
            name: value for name in PASSED_ON if (value := getattr(self, name)) is not None and value != []
        }
        if self.response_format and self.response_format.type != "text":
            parameters["response_format"] = self.response_format.for_engine()
        return Question(
            chatbot=self.model,
            messages=[_message(message) for message in self.messages],
            max_tokens=min(limits, default=None),
            parameters=parameters,
            streamed=bool(self.stream),
            patience=patience,
        )


def _message(message: ChatMessage) -> Message:
    content = message.content
    if isinstance(content, list):
        content = "\n".join(part.text for part in content)
    return {"role": ROLES[type(message)], "content": content or ""}
