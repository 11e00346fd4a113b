"""Pure rules about invitations, and the mail that carries one."""

import re
from datetime import datetime
from urllib.parse import quote

from clawplane.user.v1.invitation_pb2 import InvitationState
from services.user_svc.invitations.models import Invitation
from services.user_svc.organizations.models import ROLE
from services.user_svc.organizations.roles import PERMISSIONS

INVITE = "invitations.create"
_SHOWN = 60


def state_of(row: Invitation, at: datetime) -> int:
    """Where an invitation stands: an open one whose time is over has expired."""
    if row.state == InvitationState.INVITATION_STATE_OPEN and row.expires_at <= at:
        return InvitationState.INVITATION_STATE_EXPIRED
    return row.state


def still_stands(inviters_role: int, role: int) -> bool:
    """Whether whoever invites, of that role by now (0: no member), might still invite into ``role``."""
    return INVITE in PERMISSIONS.get(inviters_role, ()) and role <= inviters_role


def shown(name: str) -> str:
    """A name that people chose, as a mail may show it: one line, not long, and nothing that mail programs make a link of."""
    line = " ".join(name.split())
    line = line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"
    return re.sub(r"\.(?=\S)", ". ", line.replace("://", " "))


def mail(row: Invitation, organization: str, inviter: str, public_url: str, token: str) -> tuple[str, str]:
    """Subject and text of the mail that carries an invitation's token."""
    until = row.expires_at.strftime("%d %B %Y, %H:%M UTC")
    subject = f"{shown(inviter)} invites you to {shown(organization)}"
    text = (
        f"{shown(inviter)} invites you to join the organization \"{shown(organization)}\" as {ROLE.words[row.role]}.\n\n"
        f"Accept or decline until {until}:\n\n{public_url}/dashboard/invitation?token={quote(token)}\n\n"
        f"The link works once, and only for {row.email}. If you did not expect it, do nothing.\n"
    )
    return subject, text
