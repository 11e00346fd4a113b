"""Whether a key holds, and for what: the hot path of every call that is made with one."""

import time
from collections.abc import Awaitable, Callable

from clawplane.user.v1 import api_key_service_pb2 as rpc
from services.kit.call import Call
from services.kit.feed import Kept, Remembered
from services.kit.known_keys import KnownKey, Uses
from services.kit.standing import Word

Hit = Callable[[str, str], Awaitable[float]]
"""(subject, rate) -> 0 when the call is within the rate, else the seconds to wait."""
_NOT_FOUND = rpc.VerifyApiKeyResponse(outcome=rpc.API_KEY_OUTCOME_NOT_FOUND)


class Verifier:
    """Answers VerifyApiKey. A key that is known costs one look-up, and its answer was made when it was read."""

    def __init__(
        self, find: Callable[[str], Awaitable[KnownKey | None]], known: "Remembered[KnownKey | None]", uses: Uses, hit: Hit
    ) -> None:  # fmt: skip
        self.find, self.known, self.uses, self.hit = find, known, uses, hit

    async def __call__(self, request: rpc.VerifyApiKeyRequest, call: Call) -> rpc.VerifyApiKeyResponse:
        """The answer; it is shared, so nobody may change it. That a key without a rate is VALID stands for as long as the key
        is remembered, and has not ended by itself."""
        text, uncounted = request.key, request.uncounted
        if uncounted:
            # Who remembers the answer may have heard of a change before this process has, and would keep what was true before it.
            found = await self.find(text)
        else:
            found = self.known.peek(text) or await self.known(text)
        if found is None:
            return _NOT_FOUND
        if not found.holds:
            return _but(found, outcome=rpc.API_KEY_OUTCOME_DISABLED)
        if found.ends_at <= time.time():
            return _but(found, outcome=rpc.API_KEY_OUTCOME_EXPIRED)
        answer: rpc.VerifyApiKeyResponse = found.answer
        if not found.permissions.issuperset(request.permissions):
            missing = sorted(set(request.permissions) - found.permissions)
            return _but(found, outcome=rpc.API_KEY_OUTCOME_INSUFFICIENT_PERMISSIONS, missing_permissions=missing)
        if uncounted:
            return answer
        caller = found.caller
        if caller.rate and (wait_s := await self.hit(f"key:{caller.key_id}", caller.rate)):
            limited = _but(found, outcome=rpc.API_KEY_OUTCOME_RATE_LIMITED)
            limited.retry_after.FromMilliseconds(max(1, int(wait_s * 1000)))
            return limited
        self.uses.note(caller.key_id)
        if not caller.rate and (kept := self.known.kept(text)) is not None and kept.value is found:
            call.stands_by(_IsValid(self, kept, found))
        return answer


class _IsValid(Word):
    """That a key without a rate is VALID: as long as it is remembered, and has not ended by itself. Each time it was used."""

    __slots__ = ("ends_at", "kept", "key_id", "verifier")

    def __init__(self, verifier: Verifier, kept: Kept[KnownKey | None], found: KnownKey) -> None:
        self.verifier, self.kept = verifier, kept
        self.key_id, self.ends_at = found.caller.key_id, found.ends_at

    def holds(self) -> bool:
        if self.ends_at <= time.time() or not self.verifier.known.holds(self.kept):
            return False
        self.verifier.uses.note(self.key_id)
        return True


def _but(found: KnownKey, **other: object) -> rpc.VerifyApiKeyResponse:
    """What is known of a key, with another outcome; a key that does not hold may nothing."""
    answer = rpc.VerifyApiKeyResponse()
    answer.CopyFrom(found.answer)
    if other["outcome"] in (rpc.API_KEY_OUTCOME_DISABLED, rpc.API_KEY_OUTCOME_EXPIRED):
        answer.ClearField("permissions")
    answer.MergeFrom(rpc.VerifyApiKeyResponse(**other))  # type: ignore[arg-type]
    return answer
