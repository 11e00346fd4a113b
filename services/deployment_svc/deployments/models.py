"""Tables of deployments and what happened to them."""

from datetime import datetime

from sqlalchemy import JSON, BigInteger, Boolean, CheckConstraint, ForeignKey, Index, Integer, LargeBinary, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from clawplane.deployment.v1.deployment_pb2 import Channel, State
from services.deployment_svc.base import Base
from services.kit.columns import Identifier, Leased, ProtoEnum, Tenant, Timestamps, UtcDateTime, Versioned, identifier

CHANNEL, STATE = ProtoEnum(Channel), ProtoEnum(State)
_PENDING, _DEPLOYING, _CAPPED = text("state = 'pending'"), text("state = 'deploying'"), text("suspended_for = 'quota'")


class Deployment(Versioned, Tenant, Leased, Base):
    """A bot that an organization has ordered. ``due_at`` is when the reconcile loop looks at it next; unset: nothing to do."""

    __tablename__ = "deployments"
    __table_args__ = (
        # One open wish, whoever clicks how often: the fingerprint is a keyed hash of user, model, channel and token.
        Index("ux_deployments__wish", "org_id", "fingerprint", unique=True, postgresql_where=_PENDING, sqlite_where=_PENDING),
        Index("ix_deployments__org_id_id", "org_id", "id"),
        Index("ix_deployments__org_id_state", "org_id", "state"),
        Index("ix_deployments__user_id_state", "user_id", "state"),
        Index("ix_deployments__due_at", "due_at"),
        Index("ix_deployments__deploying", "org_id", postgresql_where=_DEPLOYING, sqlite_where=_DEPLOYING),
        Index("ix_deployments__capped", "org_id", postgresql_where=_CAPPED, sqlite_where=_CAPPED),
        STATE.check("state"),
        CHANNEL.check("channel"),
        CheckConstraint("price_minor >= 0", name="price_minor"),
    )

    id: Mapped[str] = identifier("dep")
    user_id: Mapped[str] = mapped_column(Identifier("usr"))
    email: Mapped[str] = mapped_column(String(254))
    display_name: Mapped[str] = mapped_column(String(100), default="", server_default="")
    model: Mapped[str] = mapped_column(String(100))
    channel: Mapped[int] = mapped_column(CHANNEL)
    channel_token_sealed: Mapped[str | None] = mapped_column(Text)
    channel_api_key_sealed: Mapped[str | None] = mapped_column(Text)
    fingerprint: Mapped[bytes] = mapped_column(LargeBinary(32))
    fingerprint_key_id: Mapped[str] = mapped_column(String(64), default="", server_default="")
    """The key of the fingerprint; "": the first HMAC key, as before there was a ring."""
    state: Mapped[int] = mapped_column(STATE)
    error_message: Mapped[str] = mapped_column(Text, default="")
    suspended_for: Mapped[str] = mapped_column(String(16), default="", server_default="")
    """What a SUSPENDED one waits for: "quota", the next period; "" an operator."""
    resumed_until: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """An operator has set it going again although a spend cap was reached: until that period ends, no cap suspends it."""

    # Payment.
    payment_provider: Mapped[str] = mapped_column(String(16))
    price_minor: Mapped[int] = mapped_column(BigInteger)
    currency: Mapped[str] = mapped_column(String(3))
    livemode: Mapped[bool] = mapped_column(Boolean)
    link_number: Mapped[int] = mapped_column(Integer, default=0)
    """Counts the payment pages that the wish has had."""
    payment_url: Mapped[str] = mapped_column(Text, default="")
    payment_expires_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    payment_id: Mapped[str | None] = mapped_column(Identifier("pay"))
    """The payment that started it."""
    stripe_session_id: Mapped[str | None] = mapped_column(String(255), unique=True)
    stripe_payment_intent_id: Mapped[str | None] = mapped_column(String(255), unique=True)
    polar_id: Mapped[str | None] = mapped_column(String(255), unique=True)

    # What the market knows of it. Each is written before the step that builds on it.
    generation: Mapped[int] = mapped_column(BigInteger, default=1)
    observed_generation: Mapped[int] = mapped_column(BigInteger, default=0)
    attempts: Mapped[int] = mapped_column(Integer, default=0)
    attempting_since: Mapped[datetime | None] = mapped_column(UtcDateTime)
    tried_providers: Mapped[list[str]] = mapped_column(JSON, default=list)
    bidders: Mapped[list[str]] = mapped_column(JSON, default=list)
    """Who made an offer for the order: after a lease, a market forgets the others."""
    order_intended: Mapped[bool] = mapped_column(Boolean, default=False)
    akash_deployment_id: Mapped[str | None] = mapped_column(String(128), index=True)
    manifest_sealed: Mapped[str | None] = mapped_column(Text)
    offers_since: Mapped[datetime | None] = mapped_column(UtcDateTime)
    provider: Mapped[str] = mapped_column(String(128), default="")
    offer_reference: Mapped[str] = mapped_column(String(255), default="")
    claw_key_id: Mapped[str | None] = mapped_column(Identifier("key"))
    """The key of the latest start."""
    akash_lease_id: Mapped[str | None] = mapped_column(String(255), index=True)
    leased_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    provider_url: Mapped[str] = mapped_column(Text, default="")
    silent_since: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Since when a running bot has not answered."""
    undoing: Mapped[bool] = mapped_column(Boolean, default=False)
    """The attempt failed: its order has to be closed before the next one."""
    activated_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    deleted_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    """Hidden from its owner since; kept for the books."""


class DeploymentEvent(Tenant, Timestamps, Base):
    """One thing that happened to a deployment; never changed. The order of an organization's ids is the order of their commits."""

    __tablename__ = "deployment_events"
    __table_args__ = (
        Index("ix_deployment_events__deployment_id_id", "deployment_id", "id"),
        Index("ix_deployment_events__org_id_id", "org_id", "id"),
        STATE.check("state"),
    )

    id: Mapped[str] = identifier("devt")
    deployment_id: Mapped[str] = mapped_column(Identifier("dep"), ForeignKey("deployments.id", ondelete="CASCADE"))
    kind: Mapped[str] = mapped_column(String(50))
    state: Mapped[int] = mapped_column(STATE)
    message: Mapped[str] = mapped_column(Text)
