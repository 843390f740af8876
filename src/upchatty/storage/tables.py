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
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

from upchatty.storage.vector_type import HalfVector

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
    Column("policy", String(16), nullable=False, server_default="open"),
    Column("threshold", Float, nullable=True),
    Column("fallback_message", Text, nullable=True),
    Column("passages", Integer, nullable=True),
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

documents = Table(
    "documents",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("chatbot_id", ForeignKey("chatbots.id", ondelete="CASCADE"), nullable=False),
    # Of a page that was found in a sitemap or on a site.
    Column("parent_id", ForeignKey("documents.id", ondelete="CASCADE"), nullable=True),
    Column("kind", String(16), nullable=False),
    # What makes it the same document: SHA-256, in hex.
    Column("identity", String(64), nullable=False),
    Column("title", Text, nullable=False),
    Column("url", Text, nullable=True),
    Column("media_type", Text, nullable=True),
    Column("options", JSON(none_as_null=True), nullable=True),
    Column("status", String(16), nullable=False),
    Column("reason", Text, nullable=True),
    # Of the version that answers.
    Column("bytes", BigInteger, nullable=False, server_default="0"),
    Column("pages", Integer, nullable=True),
    Column("passages", Integer, nullable=False, server_default="0"),
    Column("tokens", Integer, nullable=False, server_default="0"),
    # Of the reading that goes on: passages, or pages of a sitemap or site.
    Column("done", Integer, nullable=False, server_default="0"),
    Column("total", Integer, nullable=True),
    # Of what was read last, to see what has changed.
    Column("content_hash", String(64), nullable=True),
    Column("etag", Text, nullable=True),
    Column("last_modified", Text, nullable=True),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("read_at", BigInteger, nullable=True),
    Column("read_again_at", BigInteger, nullable=True),
    UniqueConstraint("chatbot_id", "identity"),
    Index("ix_documents_chatbot_id_content_hash", "chatbot_id", "content_hash"),
    Index("ix_documents_parent_id", "parent_id"),
    Index("ix_documents_read_again_at", "read_again_at"),
)

document_contents = Table(
    "document_contents",
    metadata,
    Column("document_id", ForeignKey("documents.id", ondelete="CASCADE"), primary_key=True),
    Column("content", LargeBinary, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("document_id", ForeignKey("documents.id", ondelete="CASCADE"), primary_key=True),
    Column("attempts", Integer, nullable=False, server_default="0"),
    # When it may be claimed: of a claimed one the end of its lease.
    Column("run_at", BigInteger, nullable=False),
    # The process that has claimed it, as it names itself.
    Column("worker", Text, nullable=True),
    # Of the newest wish to read the document, which tells it from the one that a worker has claimed.
    Column("created_at", BigInteger, nullable=False),
    Index("ix_jobs_run_at", "run_at"),
)

# Embeddings of a document that is being read: what is here need not be made again after a crash.
staged_embeddings = Table(
    "staged_embeddings",
    metadata,
    Column("document_id", ForeignKey("documents.id", ondelete="CASCADE"), primary_key=True),
    Column("hash", String(64), primary_key=True),
    Column("embedding_model", Text, primary_key=True),
    Column("embedding", LargeBinary, nullable=False),
)

unanswered = Table(
    "unanswered",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("chatbot_id", ForeignKey("chatbots.id", ondelete="CASCADE"), nullable=False),
    Column("question", Text, nullable=False),
    Column("score", Float, nullable=False),
    Column("embedding_model", Text, nullable=True),
    Column("embedding", LargeBinary, nullable=True),
    Column("created_at", BigInteger, nullable=False),
    Index("ix_unanswered_chatbot_id_created_at", "chatbot_id", "created_at"),
)

# A chatbot's passages as a whole. Triggers keep this up to date, and `passage_terms`: see migration 0004.
passage_totals = Table(
    "passage_totals",
    metadata,
    Column("chatbot_id", ForeignKey("chatbots.id", ondelete="CASCADE"), primary_key=True),
    # The upper half of its passages' ids, so that they lie together in every index.
    Column("number", Integer, nullable=False, unique=True),
    Column("last_id", BigInteger, nullable=False),
    Column("passages", Integer, nullable=False, server_default="0"),
    Column("length", BigInteger, nullable=False, server_default="0"),
    # Counts what was published, and the passages that were removed.
    Column("revision", BigInteger, nullable=False, server_default="0"),
    Column("removed", BigInteger, nullable=False, server_default="0"),
)

passages = Table(
    "passages",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True, autoincrement=False),
    Column("chatbot_id", ForeignKey("chatbots.id", ondelete="CASCADE"), nullable=False),
    Column("document_id", ForeignKey("documents.id", ondelete="CASCADE"), nullable=False),
    # The revision of `passage_totals` with which it came.
    Column("revision", BigInteger, nullable=False),
    Column("position", Integer, nullable=False),
    Column("headings", JSON, nullable=False),
    Column("page", Integer, nullable=True),
    Column("anchor", Text, nullable=True),
    Column("text", Text, nullable=False),
    # What it is found by, separated by spaces; `length` counts them.
    Column("terms", Text, nullable=False),
    Column("length", Integer, nullable=False),
    # The same as numbers, which scores are computed from.
    Column("term_codes", LargeBinary, nullable=False),
    Column("tokens", Integer, nullable=False),
    Column("hash", String(64), nullable=False),
    Column("embedding_model", Text, nullable=False),
    Column("embedding", HalfVector, nullable=True),
    Index("ix_passages_chatbot_id_revision", "chatbot_id", "revision"),
    Index("ix_passages_document_id_position", "document_id", "position"),
)

# In how many of a chatbot's passages a term occurs.
passage_terms = Table(
    "passage_terms",
    metadata,
    Column("chatbot_id", ForeignKey("chatbots.id", ondelete="CASCADE"), primary_key=True),
    Column("term", Text, primary_key=True),
    Column("passages", Integer, nullable=False),
    sqlite_with_rowid=False,
)
