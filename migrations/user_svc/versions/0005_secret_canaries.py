"""A known text under every key of the ring, which tells a wrong key."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    op.create_table(
        "secret_canaries",
        sa.Column("key_id", sa.String(64), nullable=False),
        sa.Column("sealed", sa.String(512), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key_id", name=op.f("pk_secret_canaries")),
    )


def downgrade() -> None:
    op.drop_table("secret_canaries")
