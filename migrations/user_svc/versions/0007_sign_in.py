"""Signing in: mail, one-time codes, passwords, counted attempts, and what a session says of itself."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"

_PURPOSES = "'sign_in', 'verify_email', 'step_up', 'reset_password'"
_TIMES = ("created_at", "updated_at")


def upgrade() -> None:
    op.create_table(
        "mail_messages",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("to_address", sa.String(254), nullable=False),
        sa.Column("subject", sa.String(200), nullable=False),
        sa.Column("text_sealed", sa.Text(), nullable=True),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("problem", sa.String(100), nullable=False),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("lease_until", sa.DateTime(timezone=True), nullable=True),
        sa.Column("lease_token", sa.String(64), nullable=True),
        *_times(),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_mail_messages")),
    )
    op.create_index(op.f("ix_mail_messages__expires_at"), "mail_messages", ["expires_at"])
    op.create_table(
        "one_time_codes",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("purpose", sa.String(32), nullable=False),
        sa.Column("subject", sa.LargeBinary(32), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("details_sealed", sa.Text(), nullable=True),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        *_times(),
        sa.CheckConstraint(f"purpose IN ({_PURPOSES})", name=op.f("ck_one_time_codes__purpose")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_one_time_codes")),
    )
    op.create_index("ix_one_time_codes__subject_purpose", "one_time_codes", ["subject", "purpose"])
    op.create_index(op.f("ix_one_time_codes__expires_at"), "one_time_codes", ["expires_at"])
    op.create_table(
        "attempts",
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("subject", sa.LargeBinary(32), nullable=False),
        sa.Column("count", sa.Integer(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        *_times(),
        sa.PrimaryKeyConstraint("kind", "subject", name=op.f("pk_attempts")),
    )
    op.create_index(op.f("ix_attempts__expires_at"), "attempts", ["expires_at"])
    op.create_table(
        "passwords",
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("hash", sa.String(255), nullable=False),
        sa.Column("changed_at", sa.DateTime(timezone=True), nullable=False),
        *_times(),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_passwords__user_id__users"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("user_id", name=op.f("pk_passwords")),
    )
    # Defaults that no session keeps: both engines ask for one where rows may exist, and SQLite takes only what is the same for all of them.
    op.add_column("sessions", sa.Column("ip", sa.String(45), nullable=False, server_default=""))
    op.add_column("sessions", sa.Column("device", sa.String(200), nullable=False, server_default=""))
    for name in ("last_seen_at", "fresh_at"):
        op.add_column("sessions", sa.Column(name, sa.DateTime(timezone=True), nullable=False, server_default="1970-01-01 00:00:00.000000"))
    op.execute("UPDATE sessions SET last_seen_at = created_at, fresh_at = created_at")


def downgrade() -> None:
    for name in ("fresh_at", "last_seen_at", "device", "ip"):
        op.drop_column("sessions", name)
    for table in ("passwords", "attempts", "one_time_codes", "mail_messages"):
        op.drop_table(table)


def _times() -> list[sa.Column]:
    return [sa.Column(name, sa.DateTime(timezone=True), nullable=False) for name in _TIMES]
