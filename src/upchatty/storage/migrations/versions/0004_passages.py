"""Passages, the full-text index over their terms, and statistics that triggers keep."""

import sqlalchemy as sa
from alembic import op

from upchatty.errors import ConfigurationError
from upchatty.storage.vector_type import HalfVector

revision = "0004"
down_revision = "0003"

# The terms are separated by spaces already: everything else of ASCII that they have belongs to them.
SQLITE = (
    """
    CREATE VIRTUAL TABLE passage_index USING fts5(
        terms, content='passages', content_rowid='id', detail=none, columnsize=0,
        tokenize="ascii tokenchars '_-+#.,@'"
    )
    """,
    """
    CREATE TRIGGER passages_added AFTER INSERT ON passages BEGIN
        INSERT INTO passage_index (rowid, terms) VALUES (new.id, new.terms);
        UPDATE passage_totals SET passages = passages + 1, length = length + new.length
            WHERE chatbot_id = new.chatbot_id;
        INSERT INTO passage_terms (chatbot_id, term, passages)
            SELECT DISTINCT new.chatbot_id, value, 1
            FROM json_each('["' || replace(new.terms, ' ', '","') || '"]') WHERE value <> ''
            ON CONFLICT DO UPDATE SET passages = passages + 1;
    END
    """,
    """
    CREATE TRIGGER passages_unindexed AFTER DELETE ON passages BEGIN
        INSERT INTO passage_index (passage_index, rowid, terms) VALUES ('delete', old.id, old.terms);
    END
    """,
    # Where the whole chatbot goes, its statistics go by themselves.
    """
    CREATE TRIGGER passages_removed AFTER DELETE ON passages
    WHEN EXISTS (SELECT 1 FROM chatbots WHERE id = old.chatbot_id) BEGIN
        UPDATE passage_totals SET passages = passages - 1, length = length - old.length,
            revision = revision + 1, removed = removed + 1 WHERE chatbot_id = old.chatbot_id;
        UPDATE passage_terms SET passages = passages - 1 WHERE chatbot_id = old.chatbot_id
            AND term IN (SELECT value FROM json_each('["' || replace(old.terms, ' ', '","') || '"]'));
        DELETE FROM passage_terms WHERE chatbot_id = old.chatbot_id AND passages <= 0
            AND term IN (SELECT value FROM json_each('["' || replace(old.terms, ' ', '","') || '"]'));
    END
    """,
)

# A lexeme begins with the chatbot's number, so that a word's list has one chatbot's passages only.
POSTGRESQL = (
    """
    CREATE FUNCTION passage_lexemes(id bigint, terms text) RETURNS tsvector
    LANGUAGE sql IMMUTABLE PARALLEL SAFE COST 10000 RETURN array_to_tsvector(string_to_array(
        (id >> 32) || ':' || replace(terms, ' ', ' ' || (id >> 32) || ':'), ' '))
    """,
    """
    CREATE INDEX ix_passages_lexemes ON passages USING gin (passage_lexemes(id, terms))
        WITH (fastupdate = off)
    """,
    """
    CREATE FUNCTION passages_added() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        UPDATE passage_totals t SET passages = t.passages + n.passages, length = t.length + n.length
            FROM (SELECT chatbot_id, count(*) AS passages, sum(length) AS length FROM added GROUP BY 1) n
            WHERE t.chatbot_id = n.chatbot_id;
        INSERT INTO passage_terms AS t (chatbot_id, term, passages)
            SELECT chatbot_id, term, count(DISTINCT id)
            FROM added, unnest(string_to_array(terms, ' ')) AS term WHERE term <> ''
            GROUP BY 1, 2 ORDER BY 1, 2
            ON CONFLICT (chatbot_id, term) DO UPDATE SET passages = t.passages + excluded.passages;
        RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER passages_added AFTER INSERT ON passages REFERENCING NEW TABLE AS added
        FOR EACH STATEMENT EXECUTE FUNCTION passages_added()
    """,
    """
    CREATE FUNCTION passages_removed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        UPDATE passage_totals t SET passages = t.passages - n.passages, length = t.length - n.length,
            revision = t.revision + 1, removed = t.removed + n.passages
            FROM (SELECT chatbot_id, count(*) AS passages, sum(length) AS length FROM removed GROUP BY 1) n
            WHERE t.chatbot_id = n.chatbot_id;
        WITH gone AS (
            SELECT r.chatbot_id, term, count(DISTINCT r.id) AS passages
            FROM removed r JOIN chatbots c ON c.id = r.chatbot_id,
                unnest(string_to_array(r.terms, ' ')) AS term
            GROUP BY 1, 2
        ), locked AS (
            SELECT t.chatbot_id, t.term, t.passages - gone.passages AS passages
            FROM passage_terms t JOIN gone USING (chatbot_id, term) ORDER BY 1, 2 FOR UPDATE OF t
        ), dropped AS (
            DELETE FROM passage_terms t USING locked l
            WHERE t.chatbot_id = l.chatbot_id AND t.term = l.term AND l.passages <= 0
        )
        UPDATE passage_terms t SET passages = l.passages FROM locked l
            WHERE t.chatbot_id = l.chatbot_id AND t.term = l.term AND l.passages > 0;
        RETURN NULL;
    END $$
    """,
    """
    CREATE TRIGGER passages_removed AFTER DELETE ON passages REFERENCING OLD TABLE AS removed
        FOR EACH STATEMENT EXECUTE FUNCTION passages_removed()
    """,
)


def _belongs_to(table: str, column: str, *, primary_key: bool = False) -> sa.Column[str]:
    owner = sa.ForeignKey(f"{table}.id", ondelete="CASCADE")
    return sa.Column(column, sa.String(64), owner, nullable=False, primary_key=primary_key)


def upgrade() -> None:
    is_postgresql = op.get_bind().dialect.name == "postgresql"
    if is_postgresql:
        _create_vector_extension()
    op.create_table(
        "passage_totals",
        _belongs_to("chatbots", "chatbot_id", primary_key=True),
        sa.Column("number", sa.Integer, nullable=False, unique=True),
        sa.Column("last_id", sa.BigInteger, nullable=False),
        sa.Column("passages", sa.Integer, nullable=False, server_default="0"),
        sa.Column("length", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("revision", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("removed", sa.BigInteger, nullable=False, server_default="0"),
    )
    op.create_table(
        "passages",
        sa.Column(
            "id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False
        ),
        _belongs_to("chatbots", "chatbot_id"),
        _belongs_to("documents", "document_id"),
        sa.Column("revision", sa.BigInteger, nullable=False),
        sa.Column("position", sa.Integer, nullable=False),
        sa.Column("headings", sa.JSON, nullable=False),
        sa.Column("page", sa.Integer),
        sa.Column("anchor", sa.Text),
        sa.Column("text", sa.Text, nullable=False),
        sa.Column("terms", sa.Text, nullable=False),
        sa.Column("length", sa.Integer, nullable=False),
        sa.Column("term_codes", sa.LargeBinary, nullable=False),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("embedding_model", sa.Text, nullable=False),
        sa.Column("embedding", HalfVector),
    )
    op.create_index("ix_passages_chatbot_id_revision", "passages", ["chatbot_id", "revision"])
    op.create_index("ix_passages_document_id_position", "passages", ["document_id", "position"])
    op.create_table(
        "passage_terms",
        _belongs_to("chatbots", "chatbot_id", primary_key=True),
        sa.Column("term", sa.Text, primary_key=True),
        sa.Column("passages", sa.Integer, nullable=False),
        sqlite_with_rowid=False,
    )
    for statement in POSTGRESQL if is_postgresql else SQLITE:
        op.execute(statement)


def _create_vector_extension() -> None:
    connection = op.get_bind()
    installed = sa.text("SELECT 1 FROM pg_extension WHERE extname = 'vector'")
    available = sa.text("SELECT 1 FROM pg_available_extensions WHERE name = 'vector'")
    if connection.scalar(installed):
        return
    if not connection.scalar(available):
        raise ConfigurationError(
            setting="database_url",
            problem="this PostgreSQL has no extension vector, which searching documents needs; install "
            "pgvector 0.8 or later on its machine (Debian: the package postgresql-NN-pgvector)",
        )
    try:
        op.execute("CREATE EXTENSION vector")
    except sa.exc.ProgrammingError as error:
        raise ConfigurationError(
            setting="database_url",
            problem="the extension vector is not in this database, and this user may not create it; let a "
            "superuser run CREATE EXTENSION vector in it once",
        ) from error
