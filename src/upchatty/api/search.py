"""Searching a chatbot's documents over HTTP, for owners: what an answer would be given, and why."""

from typing import Annotated, Literal

from litestar import post
from msgspec import Meta, Struct

from upchatty.api.body import NO_NUL
from upchatty.api.chatbots import ChatbotId
from upchatty.api.errors import with_errors
from upchatty.api.services import Services
from upchatty.chat.answer import least_score
from upchatty.knowledge.search import Finding, Findings

Question = Annotated[str, Meta(min_length=1, max_length=100_000, extra_json_schema={"pattern": NO_NUL})]


class SearchRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """A question to search for."""

    query: Question
    limit: Annotated[int, Meta(ge=1, le=50)] | None = None
    """How many passages are kept at most; null: as many as the chatbot's answers are given."""
    messages: Annotated[list[Question], Meta(max_length=100)] = []
    """What the user has said before, oldest first: a question such as "And for children?" refers to it."""


class FindingView(Struct, kw_only=True):
    """A passage with its scores, each with the passage's place by it, and why it is kept or dropped."""

    document_id: str
    title: str
    url: str | None
    headings: list[str]
    page: int | None
    text: str
    tokens: int
    score: float
    """How well it fits, 0 to 1: what a chatbot's threshold is held against."""
    lexical_rank: int | None
    lexical_score: float
    """BM25."""
    vector_rank: int | None
    vector_score: float | None
    """The cosine of the question's and the passage's embeddings."""
    fused_score: float
    reranker_score: float | None
    kept: bool
    reason: str

    @classmethod
    def of(cls, finding: Finding) -> "FindingView":
        """The finding as the contract has it."""
        return cls(**{name: getattr(finding, name) for name in cls.__struct_fields__})


class FindingsView(Struct, kw_only=True):
    """What a search has found: the passages that are kept, best first, then some that are dropped."""

    object: Literal["list"] = "list"
    query: list[str]
    """What was searched for: the question last, and before it the messages that it refers to."""
    score: float
    """The best passage's."""
    data: list[FindingView]
    has_more: bool = False

    @classmethod
    def of(cls, findings: Findings) -> "FindingsView":
        """The findings as the contract has them."""
        passages = [FindingView.of(finding) for finding in findings.passages]
        return cls(query=findings.query, score=findings.score, data=passages)


@post("/chatbots/{chatbot_id:str}/search", status_code=200, responses=with_errors(404, 413, 415, 503))
async def search_passages(chatbot_id: ChatbotId, data: SearchRequest, services: Services) -> FindingsView:
    """The passages that an answer to a question would be given, and why: lexical, vector and fused scores."""
    chatbot = await services.chatbots.get(chatbot_id)
    found = await services.search.search(
        chatbot.id,
        [*data.messages, data.query],
        limit=data.limit or chatbot.passages,
        threshold=least_score(chatbot),
        explain=True,
    )
    return FindingsView.of(found)
