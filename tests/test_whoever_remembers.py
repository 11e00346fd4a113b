"""Whoever remembers answers is told what the tables say: what is remembered twice could outlive the change that ended it."""

from typing import Any

import grpc

from clawplane.user.v1 import api_key_service_pb2 as keys_rpc
from clawplane.user.v1 import session_service_pb2
from tests.harness import Person, Stack
from tests.signing_in import Somebody
from tests.test_auth import code_of

TRIES = 10
"""A change is heard of within a fifth of a second or so: of as many that are asked about at once, most are asked about before that."""


async def test_a_key_that_was_just_revoked(stack: Stack, person: Person) -> None:
    for _ in range(TRIES):
        made = await stack.key(person, "usage.read")
        ask: dict[bool, Any] = {uncounted: keys_rpc.VerifyApiKeyRequest(key=made.key, uncounted=uncounted) for uncounted in (False, True)}
        for request in ask.values():
            assert (await stack.api_keys.VerifyApiKey(request, metadata=stack.operator)).outcome == keys_rpc.API_KEY_OUTCOME_VALID
        await stack.api_keys.RevokeApiKey(keys_rpc.RevokeApiKeyRequest(id=made.api_key.id), metadata=person.metadata)
        answer = await stack.api_keys.VerifyApiKey(ask[True], metadata=stack.operator)
        assert answer.outcome == keys_rpc.API_KEY_OUTCOME_DISABLED


async def test_a_session_that_was_just_ended(stack: Stack) -> None:
    ada = Somebody(stack)
    own = ada.bearer(await ada.sign_in())
    # An address is mailed a handful of codes in ten minutes.
    for _ in range(3):
        other = await ada.sign_in()
        request = session_service_pb2.ValidateSessionRequest(token=other.token, uncached=True)
        for uncached in (False, True):
            asked = session_service_pb2.ValidateSessionRequest(token=other.token, uncached=uncached)
            assert (await stack.sessions.ValidateSession(asked, metadata=stack.operator)).id == other.session.id
        await stack.sessions.RevokeSession(session_service_pb2.RevokeSessionRequest(id=other.session.id), metadata=own)
        assert (await code_of(stack.sessions.ValidateSession(request, metadata=stack.operator)))[0] is grpc.StatusCode.NOT_FOUND
