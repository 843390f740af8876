"""What the routes work with."""

from dataclasses import dataclass

from upchatty.auth import Keys
from upchatty.chat.answer import Answering
from upchatty.chat.chatbots import Chatbots
from upchatty.engines.pool import Pool
from upchatty.metrics import Metrics
from upchatty.settings import Settings


@dataclass(frozen=True, slots=True)
class Services:
    """The parts of a running server, as `app` has built them."""

    settings: Settings
    metrics: Metrics
    keys: Keys
    chatbots: Chatbots
    pool: Pool
    answering: Answering
