"""What the routes work with."""

from dataclasses import dataclass
from typing import Any

from upchatty.auth import Keys
from upchatty.chat.answer import Answering
from upchatty.chat.chatbots import Chatbots
from upchatty.chat.unanswered import Unanswered
from upchatty.engines.pool import Pool
from upchatty.knowledge.documents import Documents
from upchatty.knowledge.search import Search
from upchatty.knowledge.supervision import Supervisor
from upchatty.metrics import Metrics
from upchatty.settings import Settings
from upchatty.storage.database import Database


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of a running server, as `app` has built them."""

    settings: Settings
    metrics: Metrics
    keys: Keys
    chatbots: Chatbots
    pool: Pool
    answering: Answering
    database: Database
    documents: Documents
    search: Search
    unanswered: Unanswered
    workers: Supervisor
    tracer: Any = None
    """A `Tracer`, where traces are collected. Its module is costly to import, and so is not named here."""
