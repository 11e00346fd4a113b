"""What a person's sessions say of themselves, how they end, and what asks for a fresh one."""

import time
from datetime import timedelta

import grpc
import sqlalchemy as sa

from clawplane.user.v1 import organization_pb2, session_service_pb2, user_service_pb2
from clawplane.user.v1 import sign_in_service_pb2 as rpc
from services.kit.columns import now
from services.user_svc.organizations.models import Membership
from services.user_svc.sessions.models import Session
from tests.harness import Stack, eventually
from tests.signing_in import GOOD, OK, Somebody, change, count, from_ip, refusal, winners
from tests.test_auth import code_of
from tests.test_sessions import LIST, who

UNAUTHENTICATED, DENIED = grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED


async def test_a_list_of_ones_own_sessions_without_any_token(stack: Stack) -> None:
    ada, other = Somebody(stack, ip="198.51.100.1"), Somebody(stack)
    first = await ada.sign_in()
    await other.sign_in()
    second = await ada.with_code(await ada.ask(), from_ip(stack, "203.0.113.4", "curl/8.9"))
    request = session_service_pb2.ListSessionsRequest()
    listed = await stack.sessions.ListSessions(request, metadata=ada.bearer(first))
    assert [(s.id, s.ip, s.device, s.is_current) for s in listed.sessions] == [
        (second.session.id, "203.0.113.4", "curl/8.9", False), (first.session.id, "198.51.100.1", "Firefox/133.0", True),
    ]  # fmt: skip
    assert all(s.HasField("last_seen_at") and s.HasField("idle_at") for s in listed.sessions)
    raw = listed.SerializeToString()
    assert first.token.split("_")[3].encode() not in raw and second.token.split("_")[3].encode() not in raw
    assert (await refusal(stack.sessions.ListSessions(request, metadata=stack.operator)))[1] == "USER_REQUIRED"


async def ends(stack: Stack, *credentials: object) -> None:
    """Both services refuse the credentials within a second."""

    async def refused() -> bool:
        calls = [call for one in credentials for call in (stack.deployments.ListDeployments(LIST, metadata=one), who(stack, one))]  # type: ignore[arg-type]
        return {(await code_of(call))[0] for call in calls} == {UNAUTHENTICATED}

    await eventually(refused, timeout_s=1.5)


async def test_the_other_sessions_and_all_of_them_end_everywhere(stack: Stack) -> None:
    ada = Somebody(stack)
    mine, *others = [ada.bearer(await ada.sign_in()) for _ in range(3)]
    bystander = Somebody(stack)
    theirs = bystander.bearer(await bystander.sign_in())
    for one in (mine, *others, theirs):
        await stack.deployments.ListDeployments(LIST, metadata=one)
    answer = await stack.sessions.RevokeOtherSessions(session_service_pb2.RevokeOtherSessionsRequest(), metadata=mine)
    assert answer.revoked_count == 2
    await ends(stack, *others)
    await who(stack, mine)
    everything = session_service_pb2.RevokeAllSessionsRequest()
    assert (await stack.sessions.RevokeAllSessions(everything, metadata=mine)).revoked_count == 1
    await ends(stack, mine)
    await who(stack, theirs)


async def test_use_by_either_service_keeps_a_session_and_idleness_ends_it(stack: Stack) -> None:
    ada = Somebody(stack)
    used, idle = await ada.sign_in(), await ada.sign_in()
    seen = now() - timedelta(days=2, hours=23)
    await change(stack, sa.update(Session).where(Session.id == used.session.id).values(last_seen_at=seen))
    await change(stack, sa.update(Session).where(Session.id == idle.session.id).values(last_seen_at=now() - timedelta(days=3)))
    assert (await code_of(who(stack, ada.bearer(idle))))[0] is UNAUTHENTICATED
    assert (await code_of(stack.deployments.ListDeployments(LIST, metadata=ada.bearer(idle))))[0] is UNAUTHENTICATED
    listed = await stack.sessions.ListSessions(session_service_pb2.ListSessionsRequest(), metadata=ada.bearer(used))
    assert idle.session.id not in [s.id for s in listed.sessions]
    updated = (await change(stack, sa.select(Session.updated_at).where(Session.id == used.session.id)))[0][0]
    # Through the other service alone.
    await stack.deployments.ListDeployments(LIST, metadata=ada.bearer(used))
    await eventually(lambda: count(stack, Session, Session.id == used.session.id, Session.last_seen_at > seen + timedelta(days=1)))
    assert (await change(stack, sa.select(Session.updated_at).where(Session.id == used.session.id)))[0][0] == updated


async def test_others_learn_when_a_session_ends_and_how_fresh_it_is(stack: Stack) -> None:
    ada = Somebody(stack)
    answer = await ada.sign_in()
    request = session_service_pb2.ValidateSessionRequest(token=answer.token)
    found = await stack.sessions.ValidateSession(request, metadata=stack.operator)
    assert found.idle_at.seconds - found.last_seen_at.seconds == 3 * 86400
    assert found.expires_at.seconds - found.created_at.seconds == 7 * 86400
    assert abs(found.fresh_until.seconds - time.time() - 3600) < 60


async def test_stepping_up_gives_a_fresh_session_in_place_of_the_old_one(stack: Stack) -> None:
    ada = Somebody(stack)
    old = await ada.sign_up()
    await change(stack, sa.update(Session).where(Session.id == old.session.id).values(fresh_at=now() - timedelta(hours=2)))
    delete = user_service_pb2.DeleteSelfRequest()
    assert await refusal(stack.users.DeleteSelf(delete, metadata=ada.bearer(old))) == (DENIED, "STEP_UP_REQUIRED")
    by_password = rpc.StepUpRequest(password="wrong-wrong-wrong")
    assert await refusal(ada.service.StepUp(by_password, metadata=ada.bearer(old))) == (DENIED, "SIGN_IN_FAILED")
    by_password.password = GOOD
    taken, _ = await winners([ada.service.StepUp(by_password, metadata=ada.bearer(old)) for _ in range(5)])
    assert len(taken) == 1 and taken[0].token != old.token
    await ends(stack, ada.bearer(old))
    await change(stack, sa.update(Session).where(Session.id == taken[0].session.id).values(fresh_at=now() - timedelta(hours=2)))
    await ada.service.RequestStepUp(rpc.RequestStepUpRequest(), metadata=ada.bearer(taken[0]))
    code = rpc.StepUpRequest(code=await ada.newest_code())
    fresh = await ada.service.StepUp(code, metadata=ada.bearer(taken[0]))
    token = stack.token_for(fresh.session.user_id)
    assert (await refusal(ada.service.StepUp(code, metadata=token)))[0] is grpc.StatusCode.FAILED_PRECONDITION
    assert await refusal(stack.users.DeleteSelf(delete, metadata=ada.bearer(fresh))) == (OK, "")


async def test_who_deletes_himself_is_signed_out_and_may_begin_anew(stack: Stack) -> None:
    ada, guest = Somebody(stack), Somebody(stack)
    mine, other, theirs = await ada.sign_in(), await ada.sign_in(), await guest.sign_in()
    user = await stack.users.GetUser(user_service_pb2.GetUserRequest(id=mine.session.user_id), metadata=ada.bearer(mine))
    joined = sa.insert(Membership).values(org_id=user.personal_org_id, user_id=theirs.session.user_id, role=organization_pb2.ROLE_VIEWER)
    await change(stack, joined)
    request = user_service_pb2.DeleteSelfRequest()
    assert await refusal(stack.users.DeleteSelf(request, metadata=ada.bearer(mine))) == (grpc.StatusCode.FAILED_PRECONDITION, "OWNER_REQUIRED")
    await change(stack, sa.delete(Membership).where(Membership.user_id == theirs.session.user_id, Membership.org_id == user.personal_org_id))
    assert (await stack.users.DeleteSelf(request, metadata=ada.bearer(mine))).HasField("deleted_at")
    await ends(stack, ada.bearer(mine), ada.bearer(other))
    assert await count(stack, Session, Session.user_id == user.id, Session.revoked_at.is_(None)) == 0
    assert (await ada.sign_in()).session.user_id != user.id
