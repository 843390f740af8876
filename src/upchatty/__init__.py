"""UpChatty: chatbots behind an OpenAI-compatible API, self-hosted."""

__version__ = "0.1.0"
