"""SQL: one schema, its migrations, the writes and queries."""
