"""The tables of the user service have one base, and no foreign key leads out of it."""

from sqlalchemy import MetaData
from sqlalchemy.orm import DeclarativeBase

from services.kit.audit import OUTCOME, AuditHeadRow, AuditRow, indexes
from services.kit.columns import NAMING
from services.kit.holders import KeyHolderRow
from services.kit.idempotency import IdempotencyKeyRow
from services.kit.inbox import WebhookEventRow
from services.kit.vault import CanaryRow


class Base(DeclarativeBase):
    """Declarative base of user_svc."""

    metadata = MetaData(naming_convention=NAMING)


class AuditEvent(AuditRow, Base):
    """Who did what to users and organizations."""

    __tablename__ = "audit_events"
    __table_args__ = (*indexes(), OUTCOME.check("outcome"), {"postgresql_partition_by": "RANGE (created_at)"})


class AuditHead(AuditHeadRow, Base):
    """Where the sealing of each organization's audit events has come to."""

    __tablename__ = "audit_heads"


class IdempotencyKey(IdempotencyKeyRow, Base):
    """Answers of calls that may be made again."""

    __tablename__ = "idempotency_keys"


class SecretCanary(CanaryRow, Base):
    """Tells a wrong key before any secret is lost."""

    __tablename__ = "secret_canaries"


class KeyHolder(KeyHolderRow, Base):
    """The processes that live, and the keys that each holds."""

    __tablename__ = "key_holders"


class WebhookEvent(WebhookEventRow, Base):
    """Events of identity providers."""

    __tablename__ = "webhook_events"
