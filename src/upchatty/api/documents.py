"""Documents of a chatbot over HTTP."""

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from litestar import delete, get, post
from litestar.openapi.spec import OpenAPIMediaType, Operation, RequestBody
from litestar.params import Parameter
from msgspec import UNSET, Meta, Struct, UnsetType

from upchatty.api.body import NO_NUL, JSONRequest, check_is_json, decode, read_body
from upchatty.api.chatbots import ChatbotId, Name
from upchatty.api.errors import with_errors
from upchatty.api.multipart import MULTIPART, read_form
from upchatty.api.openapi import fields_of, one_of
from upchatty.api.paging import DEFAULT_PAGE_SIZE, After, Page, PageSize, page_of
from upchatty.api.services import Services
from upchatty.errors import InvalidRequest, UnsupportedDocument, UnsupportedMediaType
from upchatty.knowledge.documents import (
    LEAST_REFRESH,
    LONGEST_URL,
    URL_PATTERN,
    Document,
    Kind,
    Schedule,
    Status,
)

SOME_TEXT = (
    "^[^\\x00]*[^\\x00\\s][^\\x00]*$"  # what a JSON schema says of a text that is not only white space
)
MOST_REFRESH = 366 * 24 * 3600  # seconds

DocumentId = Annotated[str, Parameter(description="`doc_…`")]
URL = Annotated[
    str,
    Meta(
        max_length=LONGEST_URL, extra_json_schema={"pattern": URL_PATTERN}, description="With http or https"
    ),
]
Text = Annotated[str, Meta(min_length=1, extra_json_schema={"pattern": SOME_TEXT})]
Refresh = Annotated[
    int, Meta(ge=LEAST_REFRESH, le=MOST_REFRESH, description="Seconds after which it is read again")
]
Depth = Annotated[int, Meta(ge=0, le=100, description="Links from the first page to a page at most")]
Pages = Annotated[int, Meta(ge=1, le=100_000, description="How many pages at most")]


class NewURL(Struct, forbid_unknown_fields=True, kw_only=True):
    """A page or a file in the web."""

    url: URL
    title: Name | None = None
    refresh_seconds: Refresh | None | UnsetType = UNSET


class NewSitemap(Struct, forbid_unknown_fields=True, kw_only=True):
    """The pages of a sitemap."""

    sitemap: URL
    title: Name | None = None
    pages: Pages | UnsetType = UNSET
    refresh_seconds: Refresh | None | UnsetType = UNSET


class NewSite(Struct, forbid_unknown_fields=True, kw_only=True):
    """The pages of a site, found by their links from its first page."""

    site: URL
    title: Name | None = None
    depth: Depth | UnsetType = UNSET
    pages: Pages | UnsetType = UNSET
    refresh_seconds: Refresh | None | UnsetType = UNSET


class NewText(Struct, forbid_unknown_fields=True, kw_only=True):
    """A text, which may be Markdown."""

    text: Text
    title: Name | None = None


class NewQuestion(Struct, forbid_unknown_fields=True, kw_only=True):
    """A question with its answer."""

    question: Text
    answer: Text
    title: Name | None = None


class FileFields(Struct, forbid_unknown_fields=True, kw_only=True):
    """What a form may have besides its file."""

    title: Name | UnsetType = UNSET
    url: URL | UnsetType = UNSET
    """Where people find the file, for citations."""


New = NewURL | NewSitemap | NewSite | NewText | NewQuestion
NEW: dict[str, type[New]] = {
    "url": NewURL,
    "sitemap": NewSitemap,
    "site": NewSite,
    "text": NewText,
    "question": NewQuestion,
}
ONE_OF = "expected exactly one of url, sitemap, site, text and question; or a form with a file"
FORM = fields_of(FileFields, file={"type": "string", "format": "binary", "minLength": 1})


class Progress(Struct, kw_only=True):
    """How far the reading of a document is, in passages; of a site in pages."""

    done: int
    total: int | None


class DocumentView(Struct, kw_only=True):
    """A document. Times are unix seconds. Bytes, pages, passages and tokens are those of the version that
    answers."""

    id: str
    object: Literal["document"] = "document"
    kind: Kind
    title: str
    url: str | None
    parent: str | None
    status: Status
    reason: str | None
    bytes: int
    pages: int | None
    passages: int
    tokens: int
    progress: Progress
    refresh_seconds: int | None
    created_at: int
    updated_at: int
    read_at: int | None

    @classmethod
    def of(cls, document: Document) -> "DocumentView":
        """The document as the contract has it."""
        fields = document._asdict()
        progress = Progress(done=fields.pop("done"), total=fields.pop("total"))
        del fields["chatbot_id"]
        times = {
            "created_at": document.created_at // 1000,
            "updated_at": document.updated_at // 1000,
            "read_at": None if document.read_at is None else document.read_at // 1000,
        }
        return cls(**fields | times, progress=progress)


@dataclass
class NewDocumentOperation(Operation):
    """An operation whose body is JSON of several kinds, or a form."""

    def __post_init__(self) -> None:
        self.request_body = RequestBody(
            content={
                "application/json": OpenAPIMediaType(schema=one_of(*NEW.values())),
                MULTIPART: OpenAPIMediaType(schema=FORM),
            },
            required=True,
        )


@post(
    "/chatbots/{chatbot_id:str}/documents",
    status_code=202,
    request_max_body_size=None,  # of a file there is a setting of its own
    operation_class=NewDocumentOperation,
    responses=with_errors(404, 413, 415),
)
async def add_document(chatbot_id: ChatbotId, request: JSONRequest, services: Services) -> DocumentView:
    """Add a document, which is read from then on. The same one twice is one document."""
    headers: dict[bytes, bytes] = dict(request.scope["headers"])
    content_type = headers.get(b"content-type", b"").decode("latin-1")
    chatbot = await services.chatbots.get(chatbot_id)
    if content_type.partition(";")[0].strip().lower() == MULTIPART:
        return DocumentView.of(await _add_file(chatbot.id, content_type, request, services))
    try:
        check_is_json(headers)
    except UnsupportedMediaType as error:
        raise UnsupportedDocument(got=error.fields["got"]) from None
    body = await read_body(headers, request.receive, services.settings.max_body_bytes)
    return DocumentView.of(await _add(chatbot.id, body, services))


@get("/chatbots/{chatbot_id:str}/documents", responses=with_errors(404))
async def list_documents(
    chatbot_id: ChatbotId,
    services: Services,
    *,
    limit: PageSize = DEFAULT_PAGE_SIZE,
    after: After = "",
    status: Annotated[Status | None, Parameter(description="Only those with this status")] = None,
    parent: Annotated[
        str | None,
        Parameter(description="Only the pages of this site or sitemap", pattern=NO_NUL, max_length=64),
    ] = None,
) -> Page[DocumentView]:
    """A chatbot's documents, oldest first."""
    chatbot = await services.chatbots.get(chatbot_id)
    documents = await services.documents.page(
        chatbot.id, after=after, limit=limit + 1, status=status, parent=parent
    )
    return page_of([DocumentView.of(document) for document in documents], limit)


@get("/chatbots/{chatbot_id:str}/documents/{document_id:str}", responses=with_errors(404))
async def get_document(chatbot_id: ChatbotId, document_id: DocumentId, services: Services) -> DocumentView:
    """A document, and how far its reading is."""
    chatbot = await services.chatbots.get(chatbot_id)
    return DocumentView.of(await services.documents.get(chatbot.id, document_id))


@delete("/chatbots/{chatbot_id:str}/documents/{document_id:str}", responses=with_errors(404))
async def delete_document(chatbot_id: ChatbotId, document_id: DocumentId, services: Services) -> None:
    """Delete a document with its passages; a site or sitemap with its pages."""
    chatbot = await services.chatbots.get(chatbot_id)
    await services.documents.delete(chatbot.id, document_id)


@post(
    "/chatbots/{chatbot_id:str}/documents/{document_id:str}/read",
    status_code=202,
    responses=with_errors(404),
)
async def read_document(chatbot_id: ChatbotId, document_id: DocumentId, services: Services) -> DocumentView:
    """Read a document again. Until that is done, what was read before answers."""
    chatbot = await services.chatbots.get(chatbot_id)
    return DocumentView.of(await services.documents.read_again(chatbot.id, document_id))


async def _add_file(chatbot_id: str, content_type: str, request: JSONRequest, services: Services) -> Document:
    form = await read_form(content_type, request.receive, services.settings.max_document_bytes)
    try:
        if form.file is None:
            raise InvalidRequest(parameter="file", expected="this part of the form is required")
        given = decode(msgspec.json.encode(form.fields), FileFields)
        return await services.documents.add_file(
            chatbot_id,
            await asyncio.to_thread(form.file.read),
            name=form.name,
            media_type=form.media_type,
            title=None if given.title is UNSET else given.title,
            url=None if given.url is UNSET else given.url,
        )
    finally:
        form.close()


async def _add(chatbot_id: str, body: bytes, services: Services) -> Document:
    documents = services.documents
    new: New = decode(body, NEW[_kind(body)])
    title = new.title
    match new:
        case NewText():
            return await documents.add_text(chatbot_id, new.text, title=title)
        case NewQuestion():
            return await documents.add_question(chatbot_id, new.question, new.answer, title=title)
        case NewURL():
            schedule = Schedule(refresh_seconds=new.refresh_seconds)
            return await documents.add_web(chatbot_id, "url", new.url, title=title, schedule=schedule)
        case NewSitemap():
            schedule = Schedule(refresh_seconds=new.refresh_seconds, pages=new.pages)
            return await documents.add_web(chatbot_id, "sitemap", new.sitemap, title=title, schedule=schedule)
        case NewSite():
            schedule = Schedule(refresh_seconds=new.refresh_seconds, depth=new.depth, pages=new.pages)
            return await documents.add_web(chatbot_id, "site", new.site, title=title, schedule=schedule)


def _kind(body: bytes) -> str:
    """Which kind of document a body is about."""
    try:
        value: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, ValueError, RecursionError):
        value = decode(body, dict)  # raises, and says what is wrong
    named = [name for name in NEW if isinstance(value, dict) and name in value]
    if len(named) != 1:
        raise InvalidRequest(parameter="body", expected=ONE_OF)
    return named[0]
