"""API keys and their texts; an index to find stored answers that hold a secret."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"


def upgrade() -> None:
    op.create_table(
        "api_keys",
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=False),
        sa.Column("deployment_id", sa.Uuid(), nullable=True),
        sa.Column("name", sa.String(255), nullable=False),
        sa.Column("environment", sa.String(32), nullable=False),
        sa.Column("permissions", sa.JSON(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("rate", sa.String(32), nullable=False),
        sa.Column("metadata", sa.JSON(), nullable=False),
        sa.Column("is_active", sa.Boolean(), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoke_reason", sa.String(500), nullable=False),
        sa.Column("last_used_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.CheckConstraint("environment IN ('live', 'test')", name=op.f("ck_api_keys__environment")),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name=op.f("fk_api_keys__org_id"), ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name=op.f("fk_api_keys__user_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
    )
    op.create_index("ix_api_keys__org_id_id", "api_keys", ["org_id", "id"])
    op.create_index(op.f("ix_api_keys__user_id"), "api_keys", ["user_id"])
    op.create_index(op.f("ix_api_keys__deployment_id"), "api_keys", ["deployment_id"])
    op.create_table(
        "api_key_secrets",
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("digest", sa.LargeBinary(32), nullable=False),
        sa.Column("digest_key_id", sa.String(64), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("fk_api_key_secrets__key_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_key_secrets")),
        sa.UniqueConstraint("digest", name=op.f("uq_api_key_secrets__digest")),
        sa.UniqueConstraint("key_id", "number", name=op.f("uq_api_key_secrets__key_id_number")),
    )
    op.create_index(op.f("ix_api_key_secrets__expires_at"), "api_key_secrets", ["expires_at"])
    sealed = sa.text("answer_sealed IS NOT NULL")
    op.create_index("ix_idempotency_keys__sealed", "idempotency_keys", ["created_at"], postgresql_where=sealed, sqlite_where=sealed)


def downgrade() -> None:
    op.drop_index("ix_idempotency_keys__sealed", "idempotency_keys")
    op.drop_table("api_key_secrets")
    op.drop_table("api_keys")
