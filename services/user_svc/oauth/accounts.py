"""The account of somebody whom a provider knows."""

from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.errors.v1.errors_pb2 import ErrorReason
from clawplane.user.v1 import user_pb2
from services.kit.call import Call
from services.kit.db import alone
from services.kit.errors import InvalidState, SignInFailed
from services.user_svc.oauth.rules import Profile
from services.user_svc.users import repository
from services.user_svc.users.models import User
from services.user_svc.users.rules import normal_email
from services.user_svc.users.service import UserService


async def of_profile(session: AsyncSession, users: UserService, call: Call, profile: Profile) -> User:
    """The user of an identity, locked; linked or made when the identity is new, which takes an address that both sides have verified."""
    email = normal_email(profile.email)
    # As wherever accounts are made: of two who come first, one makes it.
    await alone(session, f"e-mail {email}")
    known = await repository.by_identity(session, profile.provider, profile.subject)
    row = await repository.lock(session, known[0].id) if known else None
    if row is None:
        row = await _of_address(session, users, call, profile, email)
        await repository.link(session, row[0], profile.provider, profile.subject)
    user = row[0]
    if not user.is_active:
        raise SignInFailed()
    user.avatar_url, user.github_username = user.avatar_url or profile.avatar_url, user.github_username or profile.github_username
    return user


async def _of_address(session: AsyncSession, users: UserService, call: Call, profile: Profile, email: str) -> repository.UserRow:
    if not email:
        raise InvalidState(
            f"{profile.provider} has not verified your e-mail address: sign in with a code instead",
            reason=ErrorReason.ERROR_REASON_EMAIL_NOT_VERIFIED, provider=profile.provider,
        )  # fmt: skip
    found = await repository.find(session, email=email)
    row = await repository.lock(session, found[0].id) if found else None
    if row is None:
        return await users.create(session, call, user_pb2.User(email=email, full_name=profile.full_name), True, None)
    if row[0].email_verified_at is None:
        # Linking here would let its maker, who never proved the address, stay in the account of whoever owns it.
        raise InvalidState(
            "the account of your e-mail address is not confirmed yet: sign in with a code first",
            reason=ErrorReason.ERROR_REASON_EMAIL_NOT_VERIFIED, provider=profile.provider,
        )  # fmt: skip
    return row
