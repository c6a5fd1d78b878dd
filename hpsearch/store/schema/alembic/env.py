"""Alembic runs this: our version table, and the connection that `migrations` hands over."""

from alembic import context

from hpsearch.store.schema.tables import VERSION

# A table is made anew to change a column on SQLite, which cannot do so in place.
context.configure(connection=context.config.attributes["connection"], version_table=VERSION.name, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
