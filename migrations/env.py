"""Runs the migrations of one service on a connection that kit/migrate.py hands over."""

from alembic import context

attributes = context.config.attributes
connection = attributes["connection"]

context.configure(
    connection=connection,
    target_metadata=attributes.get("metadata"),
    version_table=f"alembic_version_{attributes['service']}",
    render_as_batch=connection.dialect.name == "sqlite",
)
with context.begin_transaction():
    context.run_migrations()
