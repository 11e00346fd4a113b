"""Names and deletion of deployments, events in an order that watchers can resume, and how far changes were followed."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

DEPLOYING = sa.text("state = 'deploying'")


def upgrade() -> None:
    op.create_table(
        "idempotency_keys",
        sa.Column("key", sa.LargeBinary(32), nullable=False),
        sa.Column("request", sa.LargeBinary(32), nullable=False),
        sa.Column("resource_id", sa.String(100), nullable=False),
        sa.Column("answer", sa.LargeBinary(), nullable=True),
        sa.Column("answer_sealed", sa.Text(), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_idempotency_keys")),
    )
    op.create_index(op.f("ix_idempotency_keys__expires_at"), "idempotency_keys", ["expires_at"])
    op.create_table(
        "feed_cursors",
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_feed_cursors")),
    )
    op.add_column("deployments", sa.Column("display_name", sa.String(100), nullable=False, server_default=""))
    op.add_column("deployments", sa.Column("deleted_at", sa.DateTime(timezone=True), nullable=True))
    op.create_index("ix_deployments__deploying", "deployments", ["org_id"], postgresql_where=DEPLOYING, sqlite_where=DEPLOYING)
    op.create_index("ix_deployment_events__org_id_id", "deployment_events", ["org_id", "id"])


def downgrade() -> None:
    op.drop_index(op.f("ix_idempotency_keys__expires_at"), "idempotency_keys")
    op.drop_table("idempotency_keys")
    op.drop_index("ix_deployment_events__org_id_id", "deployment_events")
    op.drop_index("ix_deployments__deploying", "deployments")
    op.drop_column("deployments", "deleted_at")
    op.drop_column("deployments", "display_name")
    op.drop_table("feed_cursors")
