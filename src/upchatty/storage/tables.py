"""The tables. Times are unix milliseconds; ids are made by the domain, never by the database."""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    false,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(column_0_label)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "pk": "pk_%(table_name)s",
    }
)

chatbots = Table(
    "chatbots",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("published_version", Integer, nullable=False),
    Column("latest_version", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

chatbot_versions = Table(
    "chatbot_versions",
    metadata,
    Column("chatbot_id", ForeignKey("chatbots.id", ondelete="CASCADE"), primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("name", Text, nullable=False),
    Column("instructions", Text, nullable=False),
    Column("model", Text, nullable=True),
    Column("temperature", Float, nullable=True),
    Column("max_tokens", Integer, nullable=True),
    Column("keep_text", Boolean, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("limits", JSON(none_as_null=True), nullable=True),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", Text, nullable=False),
    Column("scope", String(16), nullable=False),
    Column("chatbots", JSON, nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=True),
    Column("revoked_at", BigInteger, nullable=True),
    Column("limits", JSON(none_as_null=True), nullable=True),
)

completions = Table(
    "completions",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("chatbot_id", ForeignKey("chatbots.id", ondelete="CASCADE"), nullable=False),
    Column("version", Integer, nullable=False),
    Column("key_id", String(64), nullable=False),
    Column("model", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("streamed", Boolean, nullable=False),
    Column("finish_reason", String(32), nullable=False),
    Column("prompt_tokens", Integer, nullable=False),
    Column("cached_tokens", Integer, nullable=False),
    Column("completion_tokens", Integer, nullable=False),
    Column("queue_ms", Float, nullable=False),
    Column("first_token_ms", Float, nullable=True),
    Column("duration_ms", Float, nullable=False),
    Column("messages", JSON, nullable=True),
    Column("answer", Text, nullable=True),
    Column("fallback_for", Text, nullable=True),
    Column("retries", Integer, nullable=False, server_default="0"),
    Column("estimated", Boolean, nullable=False, server_default=false()),
    Index("ix_completions_chatbot_id_created_at", "chatbot_id", "created_at"),
    Index("ix_completions_created_at", "created_at"),
    Index("ix_completions_key_id_created_at", "key_id", "created_at"),
)
