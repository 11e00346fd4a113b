"""Table of the invitations."""

from datetime import datetime

from sqlalchemy import ForeignKey, Index, LargeBinary, String, text
from sqlalchemy.orm import Mapped, mapped_column

from clawplane.user.v1.invitation_pb2 import InvitationState
from services.kit.columns import Identifier, ProtoEnum, Tenant, Timestamps, UtcDateTime, identifier
from services.user_svc.base import Base
from services.user_svc.organizations.models import ROLE

STATE = ProtoEnum(InvitationState)
_IS_OPEN = text("state = 'open'")


class Invitation(Tenant, Timestamps, Base):
    """An address that is asked into an organization: only a hash of the token that was sent last."""

    __tablename__ = "invitations"
    __table_args__ = (
        Index("ux_invitations__email", "org_id", "email", unique=True, postgresql_where=_IS_OPEN, sqlite_where=_IS_OPEN),
        Index("ix_invitations__org_id__id", "org_id", "id"),
        ROLE.check("role"),
        STATE.check("state"),
    )

    org_id: Mapped[str] = mapped_column(Identifier("org"), ForeignKey("organizations.id", ondelete="CASCADE"), sort_order=-20)
    id: Mapped[str] = identifier("inv")
    email: Mapped[str] = mapped_column(String(254))
    role: Mapped[int] = mapped_column(ROLE)
    state: Mapped[int] = mapped_column(STATE, default=InvitationState.INVITATION_STATE_OPEN)
    """One that nobody answered stays open here until another one to the address takes its place; ``rules.state_of`` knows better."""
    invited_by: Mapped[str] = mapped_column(Identifier("usr"), ForeignKey("users.id", ondelete="CASCADE"), index=True)
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    sent_at: Mapped[datetime] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
    ended_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
