"""Who holds which keys, which keys are done with, and the key of each fingerprint."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.create_table(
        "key_holders",
        sa.Column("id", sa.String(32), nullable=False),
        sa.Column("host", sa.String(255), nullable=False),
        sa.Column("pid", sa.Integer(), nullable=False),
        sa.Column("key_ids", sa.JSON(), nullable=False),
        sa.Column("current", sa.String(64), nullable=False),
        sa.Column("reported_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_key_holders")),
    )
    op.create_index("ix_key_holders__reported_at", "key_holders", ["reported_at"])
    op.add_column("secret_canaries", sa.Column("retired", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("deployments", sa.Column("fingerprint_key_id", sa.String(64), nullable=False, server_default=""))


def downgrade() -> None:
    op.drop_column("deployments", "fingerprint_key_id")
    op.drop_column("secret_canaries", "retired")
    op.drop_table("key_holders")
