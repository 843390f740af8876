"""What is kept: tables, queries and migrations, on SQLite and PostgreSQL alike."""
