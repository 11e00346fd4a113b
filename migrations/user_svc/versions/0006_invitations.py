"""Invitations into organizations."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"

_OPEN = sa.text("state = 'open'")


def upgrade() -> None:
    op.create_table(
        "invitations",
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("email", sa.String(254), nullable=False),
        sa.Column("role", sa.String(32), nullable=False),
        sa.Column("state", sa.String(32), nullable=False),
        sa.Column("invited_by", sa.Uuid(), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.CheckConstraint("role IN ('viewer', 'developer', 'admin', 'owner')", name=op.f("ck_invitations__role")),
        sa.CheckConstraint("state IN ('open', 'accepted', 'declined', 'revoked', 'expired')", name=op.f("ck_invitations__state")),
        sa.ForeignKeyConstraint(["invited_by"], ["users.id"], name=op.f("fk_invitations__invited_by"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name=op.f("fk_invitations__org_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_invitations")),
        sa.UniqueConstraint("digest", name=op.f("uq_invitations__digest")),
    )
    op.create_index("ux_invitations__email", "invitations", ["org_id", "email"], unique=True, postgresql_where=_OPEN, sqlite_where=_OPEN)
    op.create_index("ix_invitations__org_id__id", "invitations", ["org_id", "id"])
    op.create_index(op.f("ix_invitations__invited_by"), "invitations", ["invited_by"])
    op.create_index(op.f("ix_invitations__expires_at"), "invitations", ["expires_at"])


def downgrade() -> None:
    op.drop_table("invitations")
