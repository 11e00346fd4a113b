"""What only the platform changes of a user."""

from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1.change_service_pb2 import ChangeKind
from clawplane.user.v1.user_service_pb2 import UpdateUserAccountRequest
from services.kit.columns import now
from services.user_svc.changes.repository import record
from services.user_svc.sessions import repository as sessions
from services.user_svc.users import lifecycle, repository


async def update(session: AsyncSession, row: repository.UserRow, request: UpdateUserAccountRequest) -> None:
    """Changes the fields that are set, and tells other services what they must learn."""
    user, organization = row
    if request.HasField("email_verified"):
        user.email_verified_at = (user.email_verified_at or now()) if request.email_verified else None
    for name in ("polar_customer_id", "stripe_customer_id"):
        if request.HasField(name):
            setattr(user, name, getattr(request, name) or None)
    if request.HasField("tier"):
        organization.tier = request.tier
    if request.HasField("subscription_status"):
        organization.subscription_status = request.subscription_status
    switched = request.HasField("is_active") and user.is_active != request.is_active
    if switched:
        user.is_active = request.is_active
    await session.flush()
    if request.HasField("tier") or request.HasField("subscription_status"):
        await record(session, ChangeKind.CHANGE_KIND_ENTITLEMENTS, organization.id, organization.id)
    if switched:
        await lifecycle.announce_access(session, user.id)
    if switched and not user.is_active:
        # They would hold again as soon as he is switched on.
        await sessions.revoke_all(session, user.id, organization.id)
