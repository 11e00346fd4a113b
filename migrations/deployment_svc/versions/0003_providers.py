"""What the platform learns of providers, and bots that do not answer."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

KINDS = "kind IN ('lease', 'ready', 'lost')"


def times() -> list[sa.Column[object]]:
    return [sa.Column(name, sa.DateTime(timezone=True), nullable=False) for name in ("created_at", "updated_at")]


def upgrade() -> None:
    op.create_table(
        "providers",
        sa.Column("address", sa.String(128), nullable=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in ("offers", "leases", "readies", "losses", "failures")),
        *(sa.Column(name, sa.DateTime(timezone=True), nullable=True) for name in ("last_offer_at", "last_ready_at", "last_failure_at")),
        sa.Column("last_failure", sa.Text(), nullable=False),
        *times(),
        sa.PrimaryKeyConstraint("address", name=op.f("pk_providers")),
    )
    op.create_index(op.f("ix_providers__last_offer_at"), "providers", ["last_offer_at"])
    op.create_table(
        "provider_outcomes",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("provider_address", sa.String(128), nullable=False),
        sa.Column("deployment_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("is_good", sa.Boolean(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        *times(),
        sa.CheckConstraint(KINDS, name=op.f("ck_provider_outcomes__kind")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_provider_outcomes")),
    )
    op.create_index("ix_provider_outcomes__provider_address_created_at", "provider_outcomes", ["provider_address", "created_at"])
    op.create_index("ix_provider_outcomes__expires_at", "provider_outcomes", ["expires_at"])
    op.add_column("provider_blacklist", sa.Column("by_rule", sa.Boolean(), nullable=False, server_default=sa.text("false")))
    op.add_column("provider_blacklist", sa.Column("on_probation", sa.Boolean(), nullable=False, server_default=sa.text("false")))
    op.add_column("provider_blacklist", sa.Column("strikes", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("provider_blacklist", sa.Column("evidence", sa.JSON(), nullable=False, server_default="[]"))
    op.add_column("deployments", sa.Column("silent_since", sa.DateTime(timezone=True), nullable=True))


def downgrade() -> None:
    op.drop_column("deployments", "silent_since")
    for column in ("evidence", "strikes", "on_probation", "by_rule"):
        op.drop_column("provider_blacklist", column)
    op.drop_table("provider_outcomes")
    op.drop_table("providers")
