"""Limits and moments over HTTP."""

from datetime import datetime
from typing import Annotated

from msgspec import Meta

from upchatty.limits import ChatbotLimits, Limits, UnixSeconds

Moment = Annotated[datetime, Meta(tz=True)]


class NewChatbotLimits(Limits, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Limits for a chatbot; what is absent or null is not limited."""

    expires_at: UnixSeconds | Moment | None = None
    """When it stops answering: unix seconds, or RFC 3339 with a time zone."""

    @property
    def checked(self) -> ChatbotLimits:
        """The limits as a chatbot keeps them."""
        amounts = {field: getattr(self, field) for field in Limits.__struct_fields__}
        moment = self.expires_at
        return ChatbotLimits(
            **amounts, expires_at=int(moment.timestamp()) if isinstance(moment, datetime) else moment
        )
