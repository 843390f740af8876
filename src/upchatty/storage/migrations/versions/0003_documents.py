"""Documents with the jobs that read them, what chatbots do with them, and questions without an answer."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def _belongs_to(
    table: str, column: str, *, nullable: bool = False, primary_key: bool = False
) -> sa.Column[str]:
    owner = sa.ForeignKey(f"{table}.id", ondelete="CASCADE")
    return sa.Column(column, sa.String(64), owner, nullable=nullable, primary_key=primary_key)


def upgrade() -> None:
    op.add_column(
        "chatbot_versions", sa.Column("policy", sa.String(16), nullable=False, server_default="open")
    )
    op.add_column("chatbot_versions", sa.Column("threshold", sa.Float))
    op.add_column("chatbot_versions", sa.Column("fallback_message", sa.Text))
    op.add_column("chatbot_versions", sa.Column("passages", sa.Integer))
    op.create_table(
        "documents",
        sa.Column("id", sa.String(64), primary_key=True),
        _belongs_to("chatbots", "chatbot_id"),
        _belongs_to("documents", "parent_id", nullable=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("identity", sa.String(64), nullable=False),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("url", sa.Text),
        sa.Column("media_type", sa.Text),
        sa.Column("options", sa.JSON(none_as_null=True)),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("reason", sa.Text),
        sa.Column("bytes", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("pages", sa.Integer),
        sa.Column("passages", sa.Integer, nullable=False, server_default="0"),
        sa.Column("tokens", sa.Integer, nullable=False, server_default="0"),
        sa.Column("done", sa.Integer, nullable=False, server_default="0"),
        sa.Column("total", sa.Integer),
        sa.Column("content_hash", sa.String(64)),
        sa.Column("etag", sa.Text),
        sa.Column("last_modified", sa.Text),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("read_at", sa.BigInteger),
        sa.Column("read_again_at", sa.BigInteger),
        sa.UniqueConstraint("chatbot_id", "identity"),
    )
    op.create_index("ix_documents_chatbot_id_content_hash", "documents", ["chatbot_id", "content_hash"])
    op.create_index("ix_documents_parent_id", "documents", ["parent_id"])
    op.create_index("ix_documents_read_again_at", "documents", ["read_again_at"])
    op.create_table(
        "document_contents",
        _belongs_to("documents", "document_id", primary_key=True),
        sa.Column("content", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "jobs",
        _belongs_to("documents", "document_id", primary_key=True),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("run_at", sa.BigInteger, nullable=False),
        sa.Column("worker", sa.Text),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_jobs_run_at", "jobs", ["run_at"])
    op.create_table(
        "staged_embeddings",
        _belongs_to("documents", "document_id", primary_key=True),
        sa.Column("hash", sa.String(64), primary_key=True),
        sa.Column("embedding_model", sa.Text, primary_key=True),
        sa.Column("embedding", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "unanswered",
        sa.Column("id", sa.String(64), primary_key=True),
        _belongs_to("chatbots", "chatbot_id"),
        sa.Column("question", sa.Text, nullable=False),
        sa.Column("score", sa.Float, nullable=False),
        sa.Column("embedding_model", sa.Text),
        sa.Column("embedding", sa.LargeBinary),
        sa.Column("created_at", sa.BigInteger, nullable=False),
    )
    op.create_index("ix_unanswered_chatbot_id_created_at", "unanswered", ["chatbot_id", "created_at"])
