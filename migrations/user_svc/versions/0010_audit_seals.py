"""Audit events say by which credential and from where, and are sealed."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"

_OUTCOMES = "outcome IN ('done', 'read', 'repeated')"


def upgrade() -> None:
    for name, length in (("credential", 16), ("credential_id", 100), ("ip", 45)):
        op.add_column("audit_events", sa.Column(name, sa.String(length), nullable=False, server_default=""))
    # In one statement with its check: SQLite adds none to a table that is there.
    op.execute(
        "ALTER TABLE audit_events ADD COLUMN outcome VARCHAR(32) DEFAULT 'done' NOT NULL "
        f"CONSTRAINT ck_audit_events__outcome CHECK ({_OUTCOMES})"
    )
    op.add_column("audit_events", sa.Column("written", sa.LargeBinary(32), nullable=True))
    op.add_column("audit_events", sa.Column("seal_number", sa.BigInteger(), nullable=True))
    op.add_column("audit_events", sa.Column("seal", sa.LargeBinary(32), nullable=True))
    unsealed = sa.text("seal_number IS NULL")
    op.create_index("ix_audit_events__unsealed", "audit_events", ["org_id", "id"], postgresql_where=unsealed, sqlite_where=unsealed)
    op.create_index("ix_audit_events__id", "audit_events", ["id"])
    op.create_table(
        "audit_heads",
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.Column("head", sa.LargeBinary(32), nullable=False),
        sa.Column("sealed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("mac", sa.LargeBinary(32), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("updated_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("org_id", name=op.f("pk_audit_heads")),
    )


def downgrade() -> None:
    op.drop_table("audit_heads")
    op.drop_index("ix_audit_events__id", table_name="audit_events")
    op.drop_index("ix_audit_events__unsealed", table_name="audit_events")
    for name in ("seal", "seal_number", "written", "outcome", "ip", "credential_id", "credential"):
        op.drop_column("audit_events", name)
