"""The first tables of the deployment service."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def exact_decimal() -> sa.types.TypeEngine:
    """numeric on PostgreSQL, integer units on SQLite (kit/columns.py)."""
    return sa.Numeric(30, 12).with_variant(sa.BigInteger(), "sqlite")


def upgrade() -> None:
    op.create_table('audit_events',
    sa.Column('org_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('subject', sa.String(length=100), nullable=False),
    sa.Column('method', sa.String(length=200), nullable=False),
    sa.Column('resource_id', sa.String(length=100), nullable=False),
    sa.Column('project_id', sa.Uuid(), nullable=True),
    sa.Column('request_id', sa.String(length=100), nullable=False),
    sa.Column('before', sa.JSON(), nullable=True),
    sa.Column('after', sa.JSON(), nullable=True),
    sa.PrimaryKeyConstraint('org_id', 'id', 'created_at', name=op.f('pk_audit_events')),
    postgresql_partition_by='RANGE (created_at)'
    )
    op.create_index(op.f('ix_audit_events__resource_id'), 'audit_events', ['resource_id'], unique=False)
    op.create_table('deployments',
    sa.Column('org_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('user_id', sa.Uuid(), nullable=False),
    sa.Column('email', sa.String(length=254), nullable=False),
    sa.Column('model', sa.String(length=100), nullable=False),
    sa.Column('channel', sa.String(32), nullable=False),
    sa.Column('channel_token_sealed', sa.Text(), nullable=True),
    sa.Column('channel_api_key_sealed', sa.Text(), nullable=True),
    sa.Column('fingerprint', sa.LargeBinary(length=32), nullable=False),
    sa.Column('state', sa.String(32), nullable=False),
    sa.Column('error_message', sa.Text(), nullable=False),
    sa.Column('payment_provider', sa.String(length=16), nullable=False),
    sa.Column('price_minor', sa.BigInteger(), nullable=False),
    sa.Column('currency', sa.String(length=3), nullable=False),
    sa.Column('livemode', sa.Boolean(), nullable=False),
    sa.Column('link_number', sa.Integer(), nullable=False),
    sa.Column('payment_url', sa.Text(), nullable=False),
    sa.Column('payment_expires_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('payment_id', sa.Uuid(), nullable=True),
    sa.Column('stripe_session_id', sa.String(length=255), nullable=True),
    sa.Column('stripe_payment_intent_id', sa.String(length=255), nullable=True),
    sa.Column('polar_id', sa.String(length=255), nullable=True),
    sa.Column('generation', sa.BigInteger(), nullable=False),
    sa.Column('observed_generation', sa.BigInteger(), nullable=False),
    sa.Column('attempts', sa.Integer(), nullable=False),
    sa.Column('attempting_since', sa.DateTime(timezone=True), nullable=True),
    sa.Column('tried_providers', sa.JSON(), nullable=False),
    sa.Column('bidders', sa.JSON(), nullable=False),
    sa.Column('order_intended', sa.Boolean(), nullable=False),
    sa.Column('akash_deployment_id', sa.String(length=128), nullable=True),
    sa.Column('manifest_sealed', sa.Text(), nullable=True),
    sa.Column('offers_since', sa.DateTime(timezone=True), nullable=True),
    sa.Column('provider', sa.String(length=128), nullable=False),
    sa.Column('offer_reference', sa.String(length=255), nullable=False),
    sa.Column('claw_key_id', sa.Uuid(), nullable=True),
    sa.Column('akash_lease_id', sa.String(length=255), nullable=True),
    sa.Column('leased_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('provider_url', sa.Text(), nullable=False),
    sa.Column('undoing', sa.Boolean(), nullable=False),
    sa.Column('activated_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('due_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('lease_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('lease_token', sa.String(length=64), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('version', sa.BigInteger(), nullable=False),
    sa.CheckConstraint("channel IN ('telegram', 'discord', 'whatsapp', 'web')", name=op.f('ck_deployments__channel')),
    sa.CheckConstraint("state IN ('pending', 'deploying', 'active', 'suspended', 'failed', 'expired', 'canceled', 'closing', 'closed')", name=op.f('ck_deployments__state')),
    sa.CheckConstraint('price_minor >= 0', name=op.f('ck_deployments__price_minor')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_deployments')),
    sa.UniqueConstraint('polar_id', name=op.f('uq_deployments__polar_id')),
    sa.UniqueConstraint('stripe_payment_intent_id', name=op.f('uq_deployments__stripe_payment_intent_id')),
    sa.UniqueConstraint('stripe_session_id', name=op.f('uq_deployments__stripe_session_id'))
    )
    op.create_index(op.f('ix_deployments__akash_deployment_id'), 'deployments', ['akash_deployment_id'], unique=False)
    op.create_index(op.f('ix_deployments__akash_lease_id'), 'deployments', ['akash_lease_id'], unique=False)
    op.create_index('ix_deployments__due_at', 'deployments', ['due_at'], unique=False)
    op.create_index('ix_deployments__org_id_id', 'deployments', ['org_id', 'id'], unique=False)
    op.create_index('ix_deployments__org_id_state', 'deployments', ['org_id', 'state'], unique=False)
    op.create_index('ix_deployments__user_id_state', 'deployments', ['user_id', 'state'], unique=False)
    op.create_index('ux_deployments__wish', 'deployments', ['org_id', 'fingerprint'], unique=True, postgresql_where=sa.text("state = 'pending'"), sqlite_where=sa.text("state = 'pending'"))
    op.create_table('provider_blacklist',
    sa.Column('provider_address', sa.String(length=128), nullable=False),
    sa.Column('reason', sa.String(length=500), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('provider_address', name=op.f('pk_provider_blacklist'))
    )
    op.create_index('ix_provider_blacklist__created_at', 'provider_blacklist', ['created_at'], unique=False)
    op.create_table('sandbox_sessions',
    sa.Column('id', sa.String(length=100), nullable=False),
    sa.Column('idempotency_key', sa.String(length=255), nullable=False),
    sa.Column('deployment_id', sa.Uuid(), nullable=False),
    sa.Column('user_id', sa.Uuid(), nullable=False),
    sa.Column('status', sa.String(32), nullable=False),
    sa.Column('description', sa.String(length=200), nullable=False),
    sa.Column('amount_minor', sa.BigInteger(), nullable=False),
    sa.Column('currency', sa.String(length=3), nullable=False),
    sa.Column('payment_intent_id', sa.String(length=100), nullable=True),
    sa.Column('refunded_minor', sa.BigInteger(), nullable=False),
    sa.Column('success_url', sa.Text(), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), nullable=False),
    sa.CheckConstraint("status IN ('open', 'complete', 'expired')", name=op.f('ck_sandbox_sessions__status')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_sandbox_sessions')),
    sa.UniqueConstraint('idempotency_key', name=op.f('uq_sandbox_sessions__idempotency_key')),
    sa.UniqueConstraint('payment_intent_id', name=op.f('uq_sandbox_sessions__payment_intent_id'))
    )
    op.create_index(op.f('ix_sandbox_sessions__deployment_id'), 'sandbox_sessions', ['deployment_id'], unique=False)
    op.create_table('secret_canaries',
    sa.Column('key_id', sa.String(length=64), nullable=False),
    sa.Column('sealed', sa.String(length=512), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('key_id', name=op.f('pk_secret_canaries'))
    )
    op.create_table('usage_events',
    sa.Column('org_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.String(length=100), nullable=False),
    sa.Column('month', sa.Date(), nullable=False),
    sa.Column('occurred_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('user_id', sa.Uuid(), nullable=True),
    sa.Column('api_key_id', sa.String(length=40), nullable=True),
    sa.Column('deployment_id', sa.Uuid(), nullable=True),
    sa.Column('agent_id', sa.Uuid(), nullable=True),
    sa.Column('thread_id', sa.Uuid(), nullable=True),
    sa.Column('project_id', sa.Uuid(), nullable=True),
    sa.Column('provider', sa.String(length=64), nullable=False),
    sa.Column('model', sa.String(length=128), nullable=False),
    sa.Column('type', sa.String(32), nullable=False),
    sa.Column('tokens_in', sa.BigInteger(), nullable=False),
    sa.Column('tokens_out', sa.BigInteger(), nullable=False),
    sa.Column('tokens_cached', sa.BigInteger(), nullable=False),
    sa.Column('tokens_reasoning', sa.BigInteger(), nullable=False),
    sa.Column('tokens_total', sa.BigInteger(), nullable=False),
    sa.Column('cost', exact_decimal(), nullable=True),
    sa.Column('currency', sa.String(length=3), nullable=False),
    sa.Column('latency_ms', sa.BigInteger(), nullable=False),
    sa.Column('status', sa.String(32), nullable=False),
    sa.Column('operation_id', sa.String(length=100), nullable=False),
    sa.Column('attempt', sa.Integer(), nullable=False),
    sa.Column('metadata', sa.JSON(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.CheckConstraint("status IN ('ok', 'error', 'canceled')", name=op.f('ck_usage_events__status')),
    sa.CheckConstraint("type IN ('chat', 'completion', 'embedding', 'image', 'audio', 'tool')", name=op.f('ck_usage_events__type')),
    sa.CheckConstraint('tokens_in >= 0 AND tokens_out >= 0 AND tokens_cached >= 0 AND tokens_reasoning >= 0', name=op.f('ck_usage_events__tokens')),
    sa.PrimaryKeyConstraint('org_id', 'id', 'month', name=op.f('pk_usage_events')),
    postgresql_partition_by='RANGE (month)'
    )
    op.create_index('ix_usage_events__id', 'usage_events', ['id'], unique=False)
    op.create_index('ix_usage_events__org_id_occurred_at', 'usage_events', ['org_id', 'occurred_at'], unique=False)
    op.create_index('ix_usage_events__org_id_user_id_occurred_at', 'usage_events', ['org_id', 'user_id', 'occurred_at'], unique=False)
    op.create_table('usage_rollups',
    sa.Column('org_id', sa.Uuid(), nullable=False),
    sa.Column('day', sa.Date(), nullable=False),
    sa.Column('provider', sa.String(length=64), nullable=False),
    sa.Column('model', sa.String(length=128), nullable=False),
    sa.Column('deployment_id', sa.Uuid(), nullable=False),
    sa.Column('currency', sa.String(length=3), nullable=False),
    sa.Column('events', sa.BigInteger(), nullable=False),
    sa.Column('tokens_in', sa.BigInteger(), nullable=False),
    sa.Column('tokens_out', sa.BigInteger(), nullable=False),
    sa.Column('tokens_total', sa.BigInteger(), nullable=False),
    sa.Column('cost', exact_decimal(), nullable=False),
    sa.Column('unpriced_events', sa.BigInteger(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('org_id', 'day', 'provider', 'model', 'deployment_id', 'currency', name=op.f('pk_usage_rollups'))
    )
    op.create_table('webhook_events',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('source', sa.String(length=32), nullable=False),
    sa.Column('external_id', sa.String(length=255), nullable=False),
    sa.Column('type', sa.String(length=100), nullable=False),
    sa.Column('status', sa.String(length=16), nullable=False),
    sa.Column('reason', sa.String(length=500), nullable=False),
    sa.Column('payload', sa.JSON(), nullable=True),
    sa.Column('occurred_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), nullable=False),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_webhook_events')),
    sa.UniqueConstraint('source', 'external_id', name=op.f('uq_webhook_events__source_external_id'))
    )
    op.create_table('claw_keys',
    sa.Column('org_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('deployment_id', sa.Uuid(), nullable=False),
    sa.Column('user_id', sa.Uuid(), nullable=False),
    sa.Column('digest', sa.LargeBinary(length=32), nullable=False),
    sa.Column('revoked_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['deployment_id'], ['deployments.id'], name=op.f('fk_claw_keys__deployment_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_claw_keys')),
    sa.UniqueConstraint('digest', name=op.f('uq_claw_keys__digest'))
    )
    op.create_index(op.f('ix_claw_keys__deployment_id'), 'claw_keys', ['deployment_id'], unique=False)
    op.create_table('deployment_events',
    sa.Column('org_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('deployment_id', sa.Uuid(), nullable=False),
    sa.Column('kind', sa.String(length=50), nullable=False),
    sa.Column('state', sa.String(32), nullable=False),
    sa.Column('message', sa.Text(), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), nullable=False),
    sa.CheckConstraint("state IN ('pending', 'deploying', 'active', 'suspended', 'failed', 'expired', 'canceled', 'closing', 'closed')", name=op.f('ck_deployment_events__state')),
    sa.ForeignKeyConstraint(['deployment_id'], ['deployments.id'], name=op.f('fk_deployment_events__deployment_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_deployment_events'))
    )
    op.create_index('ix_deployment_events__deployment_id_id', 'deployment_events', ['deployment_id', 'id'], unique=False)
    op.create_table('payment_sessions',
    sa.Column('org_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('deployment_id', sa.Uuid(), nullable=False),
    sa.Column('provider', sa.String(length=16), nullable=False),
    sa.Column('external_id', sa.String(length=255), nullable=True),
    sa.Column('link_number', sa.Integer(), nullable=False),
    sa.Column('status', sa.String(length=16), nullable=False),
    sa.Column('amount_minor', sa.BigInteger(), nullable=False),
    sa.Column('currency', sa.String(length=3), nullable=False),
    sa.Column('url', sa.Text(), nullable=False),
    sa.Column('expires_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('due_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('lease_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('lease_token', sa.String(length=64), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), nullable=False),
    sa.CheckConstraint("status IN ('creating', 'open', 'complete', 'expired')", name=op.f('ck_payment_sessions__status')),
    sa.ForeignKeyConstraint(['deployment_id'], ['deployments.id'], name=op.f('fk_payment_sessions__deployment_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_payment_sessions')),
    sa.UniqueConstraint('deployment_id', 'link_number', name=op.f('uq_payment_sessions__deployment_id_link_number')),
    sa.UniqueConstraint('provider', 'external_id', name=op.f('uq_payment_sessions__provider_external_id'))
    )
    op.create_index('ix_payment_sessions__due_at', 'payment_sessions', ['due_at'], unique=False)
    op.create_index('ux_payment_sessions__open', 'payment_sessions', ['deployment_id'], unique=True, postgresql_where=sa.text("status IN ('creating', 'open')"), sqlite_where=sa.text("status IN ('creating', 'open')"))
    op.create_table('payments',
    sa.Column('org_id', sa.Uuid(), nullable=False),
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('deployment_id', sa.Uuid(), nullable=False),
    sa.Column('provider', sa.String(length=16), nullable=False),
    sa.Column('external_id', sa.String(length=255), nullable=False),
    sa.Column('session_id', sa.String(length=255), nullable=False),
    sa.Column('status', sa.String(32), nullable=False),
    sa.Column('amount_minor', sa.BigInteger(), nullable=False),
    sa.Column('currency', sa.String(length=3), nullable=False),
    sa.Column('livemode', sa.Boolean(), nullable=False),
    sa.Column('refunded_minor', sa.BigInteger(), nullable=False),
    sa.Column('disputed', sa.Boolean(), nullable=False),
    sa.Column('refund_due', sa.Boolean(), nullable=False),
    sa.Column('payment_mismatch', sa.Boolean(), nullable=False),
    sa.Column('attention', sa.Text(), nullable=False),
    sa.Column('last_event_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('due_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('lease_until', sa.DateTime(timezone=True), nullable=True),
    sa.Column('lease_token', sa.String(length=64), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), nullable=False),
    sa.CheckConstraint("status IN ('processing', 'failed', 'succeeded', 'refunded')", name=op.f('ck_payments__status')),
    sa.CheckConstraint('amount_minor >= 0 AND refunded_minor >= 0', name=op.f('ck_payments__amounts')),
    sa.ForeignKeyConstraint(['deployment_id'], ['deployments.id'], name=op.f('fk_payments__deployment_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_payments')),
    sa.UniqueConstraint('provider', 'external_id', name=op.f('uq_payments__provider_external_id'))
    )
    op.create_index('ix_payments__attention', 'payments', ['org_id', 'refund_due', 'payment_mismatch'], unique=False)
    op.create_index('ix_payments__deployment_id', 'payments', ['deployment_id'], unique=False)
    op.create_index('ix_payments__due_at', 'payments', ['due_at'], unique=False)
    if op.get_context().dialect.name == "postgresql":
        # Rows of a month without a partition of its own (kit/partitions.py) land here and are still found.
        op.execute("CREATE TABLE audit_events_default PARTITION OF audit_events DEFAULT")
        op.execute("CREATE TABLE usage_events_default PARTITION OF usage_events DEFAULT")


def downgrade() -> None:
    op.drop_index('ix_payments__due_at', table_name='payments')
    op.drop_index('ix_payments__deployment_id', table_name='payments')
    op.drop_index('ix_payments__attention', table_name='payments')
    op.drop_table('payments')
    op.drop_index('ux_payment_sessions__open', table_name='payment_sessions', postgresql_where=sa.text("status IN ('creating', 'open')"), sqlite_where=sa.text("status IN ('creating', 'open')"))
    op.drop_index('ix_payment_sessions__due_at', table_name='payment_sessions')
    op.drop_table('payment_sessions')
    op.drop_index('ix_deployment_events__deployment_id_id', table_name='deployment_events')
    op.drop_table('deployment_events')
    op.drop_index(op.f('ix_claw_keys__deployment_id'), table_name='claw_keys')
    op.drop_table('claw_keys')
    op.drop_table('webhook_events')
    op.drop_table('usage_rollups')
    op.drop_index('ix_usage_events__org_id_user_id_occurred_at', table_name='usage_events')
    op.drop_index('ix_usage_events__org_id_occurred_at', table_name='usage_events')
    op.drop_index('ix_usage_events__id', table_name='usage_events')
    op.drop_table('usage_events')
    op.drop_table('secret_canaries')
    op.drop_index(op.f('ix_sandbox_sessions__deployment_id'), table_name='sandbox_sessions')
    op.drop_table('sandbox_sessions')
    op.drop_index('ix_provider_blacklist__created_at', table_name='provider_blacklist')
    op.drop_table('provider_blacklist')
    op.drop_index('ux_deployments__wish', table_name='deployments', postgresql_where=sa.text("state = 'pending'"), sqlite_where=sa.text("state = 'pending'"))
    op.drop_index('ix_deployments__user_id_state', table_name='deployments')
    op.drop_index('ix_deployments__org_id_state', table_name='deployments')
    op.drop_index('ix_deployments__org_id_id', table_name='deployments')
    op.drop_index('ix_deployments__due_at', table_name='deployments')
    op.drop_index(op.f('ix_deployments__akash_lease_id'), table_name='deployments')
    op.drop_index(op.f('ix_deployments__akash_deployment_id'), table_name='deployments')
    op.drop_table('deployments')
    op.drop_index(op.f('ix_audit_events__resource_id'), table_name='audit_events')
    op.drop_table('audit_events')
