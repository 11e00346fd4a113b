"""SignInService: who somebody is, by a code from the mail or by a password."""

import secrets
from dataclasses import dataclass
from typing import Any

import orjson
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.errors.v1.errors_pb2 import ErrorReason
from clawplane.user.v1 import session_pb2, sign_in_service_pb2_grpc
from clawplane.user.v1 import sign_in_service_pb2 as rpc
from services.kit.call import Call
from services.kit.db import ALL
from services.kit.errors import Exhausted, InvalidArgument, InvalidState, NotFound, SignInFailed
from services.kit.secrets import SecretBox
from services.user_svc.codes import repository as codes
from services.user_svc.codes.models import OneTimeCode, Purpose
from services.user_svc.passwords import repository as passwords
from services.user_svc.passwords.hashing import Hasher
from services.user_svc.sessions import repository as sessions
from services.user_svc.sessions.service import person_of
from services.user_svc.settings import UserSettings
from services.user_svc.sign_in import accounts, mails
from services.user_svc.sign_in.limits import Limits
from services.user_svc.sign_in.post import Post
from services.user_svc.sign_in.start import Starter
from services.user_svc.users import repository
from services.user_svc.users.models import User
from services.user_svc.users.rules import normal_email
from services.user_svc.users.service import UserService


@dataclass(frozen=True)
class SignInService(sign_in_service_pb2_grpc.SignInServiceServicer):
    """See proto/clawplane/user/v1/sign_in_service.proto. Whether an address has an account shows neither in answers nor in the work."""

    settings: UserSettings
    users: UserService
    box: SecretBox
    limits: Limits
    hasher: Hasher
    post: Post
    starter: Starter

    async def SignUp(self, request: rpc.SignUpRequest, call: Call) -> rpc.SignUpResponse:
        address = normal_email(request.email)
        await self.hasher.check("password", request.password, address, request.full_name)
        await self.limits.asked(Purpose.VERIFY_EMAIL, address, call.client.network)
        hashed = await self.hasher.hash(request.password)
        details = orjson.dumps({"hash": hashed, "full_name": request.full_name}).decode()
        token = secrets.token_urlsafe(32)

        async def work(session: AsyncSession) -> None:
            known = await repository.find(session, email=address)
            instead = mails.account_exists(self.settings.public_url) if known and known[0].email_verified_at else None
            await self.post.code(session, Purpose.VERIFY_EMAIL, address, instead=instead, bound_to=token, details=details)

        await call.run(work, ALL)
        return rpc.SignUpResponse(sign_up_token=token)

    async def VerifyEmail(self, request: rpc.VerifyEmailRequest, call: Call) -> session_pb2.SignedIn:
        address = normal_email(request.email)
        code_id = await self._guess(call, Purpose.VERIFY_EMAIL, address, request.code, bound_to=request.sign_up_token)

        async def work(session: AsyncSession) -> session_pb2.SignedIn:
            used = await self._use(session, call, Purpose.VERIFY_EMAIL, address, code_id)
            wish = orjson.loads(codes.details_of(self.box, used))
            user = await accounts.of_address(session, self.users, call, address, wish["full_name"])
            # Who has one by now signed up twice, or set it another way: the one that works already stays.
            if await passwords.hash_of(session, user.id) is None:
                await passwords.put(session, user.id, wish["hash"])
            return self.starter.start(session, call, user, "code")

        return await self.users.retry_username(call, work, False, ALL)

    async def RequestCode(self, request: rpc.RequestCodeRequest, call: Call) -> rpc.RequestCodeResponse:
        address = normal_email(request.email)
        await self.limits.asked(Purpose.SIGN_IN, address, call.client.network)
        await call.run(lambda session: self.post.code(session, Purpose.SIGN_IN, address), ALL)
        return rpc.RequestCodeResponse()

    async def SignInWithCode(self, request: rpc.SignInWithCodeRequest, call: Call) -> session_pb2.SignedIn:
        address = normal_email(request.email)
        code_id = await self._guess(call, Purpose.SIGN_IN, address, request.code)

        async def work(session: AsyncSession) -> session_pb2.SignedIn:
            await self._use(session, call, Purpose.SIGN_IN, address, code_id)
            user = await accounts.of_address(session, self.users, call, address)
            return self.starter.start(session, call, user, "code")

        return await self.users.retry_username(call, work, False, ALL)

    async def SignIn(self, request: rpc.SignInRequest, call: Call) -> session_pb2.SignedIn:
        address, network = normal_email(request.email), call.client.network
        user, stored = await self._verified(call, address, request.password)
        if user is None or stored is None:
            raise SignInFailed()
        if user.email_verified_at is None:
            await self._mail_code_instead(call, address)
            raise SignInFailed()
        newer = await self.hasher.hash(request.password) if self.hasher.is_old(stored) else None

        async def work(session: AsyncSession) -> session_pb2.SignedIn:
            row = await repository.lock(session, user.id)
            # Changed since it was verified, or switched off.
            if row is None or not row[0].is_active or await passwords.hash_of(session, user.id) != stored:
                raise SignInFailed()
            if newer is not None:
                await passwords.put(session, user.id, newer, is_new=False)
            await self.limits.password_was_right(session, address, network)
            return self.starter.start(session, call, row[0], "password")

        answer: session_pb2.SignedIn = await call.run(work, ALL)
        return answer

    async def RequestPasswordReset(self, request: rpc.RequestPasswordResetRequest, call: Call) -> rpc.RequestPasswordResetResponse:
        address = normal_email(request.email)
        await self.limits.asked(Purpose.RESET_PASSWORD, address, call.client.network)

        async def work(session: AsyncSession) -> None:
            known = await repository.find(session, email=address)
            instead = None if known else mails.no_account(self.settings.public_url)
            await self.post.code(session, Purpose.RESET_PASSWORD, address, instead=instead)

        await call.run(work, ALL)
        return rpc.RequestPasswordResetResponse()

    async def ResetPassword(self, request: rpc.ResetPasswordRequest, call: Call) -> rpc.ResetPasswordResponse:
        address = normal_email(request.email)
        await self.hasher.check("password", request.password, address)
        code_id = await self._guess(call, Purpose.RESET_PASSWORD, address, request.code)
        hashed = await self.hasher.hash(request.password)

        async def work(session: AsyncSession) -> None:
            await self._use(session, call, Purpose.RESET_PASSWORD, address, code_id)
            if await repository.find(session, email=address) is None:
                raise SignInFailed()
            user = await accounts.of_address(session, self.users, call, address)
            await self.limits.password_was_right(session, address, call.client.network)
            await self._set_password(session, call, user, hashed)

        await call.run(work, ALL)
        return rpc.ResetPasswordResponse()

    async def ChangePassword(self, request: rpc.ChangePasswordRequest, call: Call) -> rpc.ChangePasswordResponse:
        me, network = await self._me(call), call.client.network
        if request.new_password == request.old_password:
            raise InvalidArgument("new_password", "is the same as the old one")
        await self.hasher.check("new_password", request.new_password, me.email, me.full_name, me.username)
        await self._prove_by_password(call, me, request.old_password)
        hashed = await self.hasher.hash(request.new_password)

        async def work(session: AsyncSession) -> None:
            row = await repository.lock(session, me.id)
            if row is None:
                raise NotFound("user")
            await self.limits.password_was_right(session, me.email, network)
            await self._set_password(session, call, row[0], hashed, but=call.caller.key_id)

        await call.run(work, ALL)
        return rpc.ChangePasswordResponse()

    async def RequestStepUp(self, request: rpc.RequestStepUpRequest, call: Call) -> rpc.RequestStepUpResponse:
        me = await self._me(call)
        await self.limits.asked(Purpose.STEP_UP, me.email, call.client.network)
        call.audit(me.id, org_id=me.personal_org_id)
        await call.run(lambda session: self.post.code(session, Purpose.STEP_UP, me.email), ALL)
        return rpc.RequestStepUpResponse()

    async def StepUp(self, request: rpc.StepUpRequest, call: Call) -> session_pb2.SignedIn:
        me, network = await self._me(call), call.client.network
        if not call.caller.key_id.startswith("ses_"):
            raise InvalidState("only a session can be made fresh: sign in here first", reason=ErrorReason.ERROR_REASON_INVALID_STATE)
        code_id = ""
        if request.WhichOneof("proof") == "password":
            await self._prove_by_password(call, me, request.password)
        else:
            code_id = await self._guess(call, Purpose.STEP_UP, me.email, request.code, signed_in=True)

        async def work(session: AsyncSession) -> session_pb2.SignedIn:
            if code_id:
                await self._use(session, call, Purpose.STEP_UP, me.email, code_id, signed_in=True)
            else:
                await self.limits.password_was_right(session, me.email, network)
            row = await repository.lock(session, me.id)
            old = await sessions.of_user(session, call.caller.key_id, me.id)
            # Of two that prove it at once with one session, one gets the new one.
            if row is None or old is None or old.revoked_at is not None:
                raise SignInFailed(signed_in=True)
            answer = self.starter.start(session, call, row[0], "step-up")
            await sessions.revoke(session, old, row[1].id)
            return answer

        answer: session_pb2.SignedIn = await call.run(work, ALL)
        return answer

    async def _me(self, call: Call) -> User:
        """The user who calls."""
        user_id = person_of(call)
        async with call.read() as session:
            found = await repository.find(session, id=user_id)
        if found is None:
            raise NotFound("user")
        return found[0]

    async def _guess(
        self, call: Call, purpose: Purpose, address: str, code: str, *, bound_to: str = "", signed_in: bool = False
    ) -> str:  # fmt: skip
        """The id of the code that this is; SignInFailed otherwise. Counted before anybody looks, in a transaction of its own."""
        found: Any = None
        if await self.limits.tried(purpose, address, call.client.network):
            found = await call.kit.db.run(
                lambda session: codes.attempt(session, self.box, purpose, address, code, bound_to=bound_to), ALL
            )  # fmt: skip
        if found is None:
            raise SignInFailed(signed_in=signed_in)
        return str(found)

    async def _use(
        self, session: AsyncSession, call: Call, purpose: Purpose, address: str, code_id: str, *, signed_in: bool = False
    ) -> OneTimeCode:  # fmt: skip
        """Uses a code up; SignInFailed when somebody else was faster."""
        used = await codes.use(session, self.box, purpose, address, code_id)
        if used is None:
            raise SignInFailed(signed_in=signed_in)
        await self.limits.code_was_right(session, purpose, address, call.client.network)
        return used

    async def _verified(self, call: Call, address: str, password: str) -> tuple[User | None, str | None]:
        """The user of an address and the hash, if this is the password; else (None, None). Counted first; takes as long in every case."""
        allowed = await self.limits.password_tried(address, call.client.network)
        async with call.kit.db.read(ALL) as session:
            found = await repository.find(session, email=address)
            stored = await passwords.hash_of(session, found[0].id if found else "usr_" + "0" * 32)
        right = await self.hasher.verify(stored, password)
        return (found[0], stored) if allowed and right and found else (None, None)

    async def _prove_by_password(self, call: Call, me: User, password: str) -> None:
        """SignInFailed unless this is the caller's password; InvalidState when there is none."""
        async with call.kit.db.read(ALL) as session:
            if await passwords.hash_of(session, me.id) is None:
                raise InvalidState("the account has no password: RequestPasswordReset mails a code that sets one")
        if (await self._verified(call, me.email, password))[0] is None:
            raise SignInFailed(signed_in=True)

    async def _set_password(self, session: AsyncSession, call: Call, user: User, hashed: str, but: str = "") -> None:
        """Stores a new password, tells its owner, and ends the sessions that began with another one. Call it last."""
        await passwords.put(session, user.id, hashed)
        call.audit(user.id, org_id=user.personal_org_id, subject=user.id)
        await self.post.send(session, user.email, mails.password_changed(self.settings.public_url))
        await sessions.revoke_all(session, user.id, user.personal_org_id, but=but if but.startswith("ses_") else "")

    async def _mail_code_instead(self, call: Call, address: str) -> None:
        """For somebody with the right password and an address that is no longer proven."""
        try:
            await self.limits.asked(Purpose.SIGN_IN, address, call.client.network)
        except Exhausted:
            return
        await call.kit.db.run(lambda session: self.post.code(session, Purpose.SIGN_IN, address), ALL)
