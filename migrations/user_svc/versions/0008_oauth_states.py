"""Sign-ins under way at a provider."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "oauth_states",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("provider", sa.String(32), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("browser", sa.LargeBinary(32), nullable=False),
        sa.Column("redirect_path", sa.String(2048), nullable=False),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_oauth_states")),
        sa.UniqueConstraint("digest", name=op.f("uq_oauth_states__digest")),
    )
    op.create_index(op.f("ix_oauth_states__expires_at"), "oauth_states", ["expires_at"])


def downgrade() -> None:
    op.drop_table("oauth_states")
