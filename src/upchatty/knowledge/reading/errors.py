"""Why a document cannot be read."""

from upchatty.errors import UpChattyError


class Unreadable(UpChattyError):
    """There is no text to be had from this document; `problem` says why and what would help."""
