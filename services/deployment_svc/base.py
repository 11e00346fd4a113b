"""The tables of the deployment service have one base, and no foreign key leads out of it."""

from sqlalchemy import MetaData
from sqlalchemy.orm import DeclarativeBase

from services.kit.audit import OUTCOME, AuditHeadRow, AuditRow, indexes
from services.kit.columns import NAMING
from services.kit.holders import KeyHolderRow
from services.kit.idempotency import IdempotencyKeyRow
from services.kit.inbox import WebhookEventRow
from services.kit.vault import CanaryRow


class Base(DeclarativeBase):
    """Declarative base of deployment_svc."""

    metadata = MetaData(naming_convention=NAMING)


class AuditEvent(AuditRow, Base):
    """Who did what to deployments and what belongs to them."""

    __tablename__ = "audit_events"
    __table_args__ = (*indexes(), OUTCOME.check("outcome"), {"postgresql_partition_by": "RANGE (created_at)"})


class AuditHead(AuditHeadRow, Base):
    """Where the sealing of each organization's audit events has come to."""

    __tablename__ = "audit_heads"


class IdempotencyKey(IdempotencyKeyRow, Base):
    """Answers of calls that may be made again."""

    __tablename__ = "idempotency_keys"


class KeyHolder(KeyHolderRow, Base):
    """The processes that live, and the keys that each holds."""

    __tablename__ = "key_holders"


class WebhookEvent(WebhookEventRow, Base):
    """Events of payment providers."""

    __tablename__ = "webhook_events"


class SecretCanary(CanaryRow, Base):
    """Tells a wrong encryption key at start."""

    __tablename__ = "secret_canaries"
