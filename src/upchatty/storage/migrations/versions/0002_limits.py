"""Limits of keys and chatbots, and what a record says of a fallback, of retries and of estimated usage."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.add_column("keys", sa.Column("limits", sa.JSON(none_as_null=True)))
    op.add_column("chatbot_versions", sa.Column("limits", sa.JSON(none_as_null=True)))
    op.add_column("completions", sa.Column("fallback_for", sa.Text))
    op.add_column("completions", sa.Column("retries", sa.Integer, nullable=False, server_default="0"))
    op.add_column(
        "completions", sa.Column("estimated", sa.Boolean, nullable=False, server_default=sa.false())
    )
    op.create_index("ix_completions_key_id_created_at", "completions", ["key_id", "created_at"])
