"""The first tables of the user service."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


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
    op.create_table('organizations',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('name', sa.String(length=200), nullable=False),
    sa.Column('is_personal', sa.Boolean(), nullable=False),
    sa.Column('tier', sa.String(length=32), nullable=False),
    sa.Column('subscription_status', sa.String(32), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('version', sa.BigInteger(), nullable=False),
    sa.CheckConstraint("subscription_status IN ('unspecified', 'active', 'incomplete', 'past_due', 'canceled', 'unpaid')", name=op.f('ck_organizations__subscription_status')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_organizations'))
    )
    op.create_table('users',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('personal_org_id', sa.Uuid(), nullable=False),
    sa.Column('email', sa.String(length=254), nullable=False),
    sa.Column('email_verified_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('username', sa.String(length=50), nullable=False),
    sa.Column('full_name', sa.String(length=200), nullable=False),
    sa.Column('avatar_url', sa.String(length=2048), nullable=False),
    sa.Column('bio', sa.Text(), nullable=False),
    sa.Column('location', sa.String(length=200), nullable=False),
    sa.Column('website_url', sa.String(length=2048), nullable=False),
    sa.Column('github_username', sa.String(length=39), nullable=False),
    sa.Column('clerk_user_id', sa.String(length=255), nullable=True),
    sa.Column('polar_customer_id', sa.String(length=255), nullable=True),
    sa.Column('stripe_customer_id', sa.String(length=255), nullable=True),
    sa.Column('is_active', sa.Boolean(), nullable=False),
    sa.Column('preferences', sa.JSON(), nullable=False),
    sa.Column('settings', sa.JSON(), nullable=False),
    sa.Column('last_login_at', sa.DateTime(timezone=True), nullable=True),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('version', sa.BigInteger(), nullable=False),
    sa.ForeignKeyConstraint(['personal_org_id'], ['organizations.id'], name=op.f('fk_users__personal_org_id')),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_users')),
    sa.UniqueConstraint('clerk_user_id', name=op.f('uq_users__clerk_user_id')),
    sa.UniqueConstraint('personal_org_id', name=op.f('uq_users__personal_org_id')),
    sa.UniqueConstraint('polar_customer_id', name=op.f('uq_users__polar_customer_id')),
    sa.UniqueConstraint('stripe_customer_id', name=op.f('uq_users__stripe_customer_id')),
    sa.UniqueConstraint('username', name=op.f('uq_users__username'))
    )
    op.create_index('ux_users__email', 'users', [sa.text('lower(email)')], unique=True)
    op.create_index('ix_users__created_at', 'users', ['created_at'], unique=False)
    op.create_index(op.f('ix_users__github_username'), 'users', ['github_username'], unique=False)
    op.create_table('identities',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('user_id', sa.Uuid(), nullable=False),
    sa.Column('provider', sa.String(length=32), nullable=False),
    sa.Column('subject', sa.String(length=255), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), nullable=False),
    sa.ForeignKeyConstraint(['user_id'], ['users.id'], name=op.f('fk_identities__user_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_identities')),
    sa.UniqueConstraint('provider', 'subject', name=op.f('uq_identities__provider_subject'))
    )
    op.create_index(op.f('ix_identities__user_id'), 'identities', ['user_id'], unique=False)
    op.create_table('memberships',
    sa.Column('id', sa.Uuid(), nullable=False),
    sa.Column('org_id', sa.Uuid(), nullable=False),
    sa.Column('user_id', sa.Uuid(), nullable=False),
    sa.Column('role', sa.String(32), nullable=False),
    sa.Column('created_at', sa.DateTime(timezone=True), nullable=False),
    sa.Column('updated_at', sa.DateTime(timezone=True), nullable=False),
    sa.CheckConstraint("role IN ('viewer', 'developer', 'admin', 'owner')", name=op.f('ck_memberships__role')),
    sa.ForeignKeyConstraint(['org_id'], ['organizations.id'], name=op.f('fk_memberships__org_id'), ondelete='CASCADE'),
    sa.ForeignKeyConstraint(['user_id'], ['users.id'], name=op.f('fk_memberships__user_id'), ondelete='CASCADE'),
    sa.PrimaryKeyConstraint('id', name=op.f('pk_memberships')),
    sa.UniqueConstraint('org_id', 'user_id', name=op.f('uq_memberships__org_id_user_id'))
    )
    op.create_index(op.f('ix_memberships__user_id'), 'memberships', ['user_id'], unique=False)
    op.create_index('ux_memberships__owner', 'memberships', ['org_id'], unique=True, postgresql_where=sa.text("role = 'owner'"), sqlite_where=sa.text("role = 'owner'"))
    if op.get_context().dialect.name == "postgresql":
        # Rows of a month without a partition of its own (kit/partitions.py) land here and are still found.
        op.execute("CREATE TABLE audit_events_default PARTITION OF audit_events DEFAULT")


def downgrade() -> None:
    op.drop_index('ux_memberships__owner', table_name='memberships', postgresql_where=sa.text("role = 'owner'"), sqlite_where=sa.text("role = 'owner'"))
    op.drop_index(op.f('ix_memberships__user_id'), table_name='memberships')
    op.drop_table('memberships')
    op.drop_index(op.f('ix_identities__user_id'), table_name='identities')
    op.drop_table('identities')
    op.drop_index(op.f('ix_users__github_username'), table_name='users')
    op.drop_index('ux_users__email', table_name='users')
    op.drop_index('ix_users__created_at', table_name='users')
    op.drop_table('users')
    op.drop_table('organizations')
    op.drop_index(op.f('ix_audit_events__resource_id'), table_name='audit_events')
    op.drop_table('audit_events')
