"""An index to find stored answers that hold a secret."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    sealed = sa.text("answer_sealed IS NOT NULL")
    op.create_index("ix_idempotency_keys__sealed", "idempotency_keys", ["created_at"], postgresql_where=sealed, sqlite_where=sealed)


def downgrade() -> None:
    op.drop_index("ix_idempotency_keys__sealed", "idempotency_keys")
