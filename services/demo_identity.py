"""The people of the demo: a real sign-in, an invitation, and an API key that is rotated under traffic and revoked."""

import asyncio
import re
import secrets
import sys
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import httpx

from clawplane.user.v1 import access_service_pb2, access_service_pb2_grpc, mailbox_service_pb2
from services.demo_stack import DemoError, until
from services.kit.settings import KitSettings

if TYPE_CHECKING:
    from services.demo import Demo

_CODE, _LINK_TOKEN = re.compile(r"^    ([0-9A-Z]{6})$", re.MULTILINE), re.compile(r"[?&]token=(\w+)")
_CALLERS, _GRACE_S, _REFUSED_WITHIN_S = 8, 5, 1.0
_ROTATED, _REVOKED = "/clawplane.user.v1.ApiKeyService/RotateApiKey", "/clawplane.user.v1.ApiKeyService/RevokeApiKey"


@dataclass
class Mailbox:
    """What a stack in development keeps instead of sending it."""

    stub: Any
    """Of MailboxService."""
    metadata: tuple[tuple[str, str], ...]

    async def is_open(self) -> bool:
        """Whether there is one: not where a mail server is set, and not in production."""
        try:
            await self.stub.ListMailMessages(mailbox_service_pb2.ListMailMessagesRequest(page_size=1), metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return False
            raise
        return True

    async def find(self, address: str, pattern: re.Pattern[str]) -> str:
        """What the newest mail to an address says at a place."""

        async def check() -> str | None:
            request = mailbox_service_pb2.ListMailMessagesRequest(to_address=address)
            for mail in (await self.stub.ListMailMessages(request, metadata=self.metadata)).mail_messages:
                if found := pattern.search(mail.text):
                    return found[1]
            return None

        return await until(f"the mail to {address}", check)


def address_of(name: str) -> str:
    """An address that nobody had before."""
    return f"{name.lower()}.{secrets.token_hex(4)}@example.com"


async def sign_in(demo: "Demo", mailbox: Mailbox, name: str, address: str = "") -> dict[str, str]:
    """Signs in with a code, as anybody does; headers with the session's token."""
    address = address or address_of(name)
    await demo.json(demo.http.post("/v1/account:requestCode", json={"email": address}))
    code = await mailbox.find(address, _CODE)
    answer = await demo.json(demo.http.post("/v1/account:signInWithCode", json={"email": address, "code": code}))
    demo.say(f"{name} asked for a code, read it in the mail and is signed in until {answer['session']['expiresAt'][:10]}")
    return {"authorization": f"Bearer {answer['token']}"}


async def _whoami(demo: "Demo", person: dict[str, str]) -> access_service_pb2.Access:
    """Who a credential is."""
    return await access_service_pb2_grpc.AccessServiceStub(demo.to_users).WhoAmI(
        access_service_pb2.WhoAmIRequest(), metadata=tuple(person.items())
    )


async def run(demo: "Demo", mailbox: Mailbox, ann: dict[str, str], deployment_id: str) -> None:
    """Everything here that comes after the sign-in."""
    await _invite(demo, mailbox, ann, "Eve", deployment_id)
    await _keys(demo, ann, deployment_id)
    await _who_did_it(demo, ann)


async def _invite(demo: "Demo", mailbox: Mailbox, ann: dict[str, str], name: str, deployment_id: str) -> None:
    """A second person comes into an organization as a developer: sees what runs, and may not remove the one who invited."""
    mine, address = await _whoami(demo, ann), address_of(name)
    await demo.json(demo.http.post("/v1/invitations", json={"email": address, "role": "ROLE_DEVELOPER"}, headers=ann))
    person = await sign_in(demo, mailbox, name, address)
    token = await mailbox.find(address, _LINK_TOKEN)
    joined = await demo.json(demo.http.post("/v1/invitations:accept", json={"token": token}, headers=person))
    demo.check(joined["id"] == mine.org_id, f"{name} followed the link of Ann's invitation: a developer in {joined['name']}")
    there = person | {"clawplane-org": mine.org_id}
    seen = await demo.json(demo.http.get(f"/v1/deployments/{deployment_id}", headers=there))
    demo.check(seen["id"] == deployment_id, f"{name} sees {deployment_id} there")
    refused = await demo.http.delete(f"/v1/members/{mine.user_id}", headers=there)
    demo.check(refused.status_code == 403, f"{name} may not remove Ann: {refused.json()['error']['message']}")


@dataclass
class Traffic:
    """Callers that use a key all the while, and take the newest one for each call."""

    http: httpx.AsyncClient
    path: str
    key: str
    calls: int = 0
    last: dict[int, str] = field(default_factory=dict)
    """Caller -> the key of his last call."""
    failures: list[str] = field(default_factory=list)
    ended: bool = False

    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    async def caller(self, number: int) -> None:
        """One of them. They learn of a new key one after the other, as in life."""
        mine = self.key
        while not self.ended:
            answer = await self.http.get(self.path, headers={"authorization": f"Bearer {mine}"})
            if answer.is_error:
                self.failures.append(f"{answer.status_code}: {answer.text}")
            self.calls, self.last[number] = self.calls + 1, mine
            if mine != self.key:
                await asyncio.sleep(0.2 * number)
                mine = self.key
            await asyncio.sleep(0.02)


async def _keys(demo: "Demo", ann: dict[str, str], deployment_id: str) -> None:
    """A key for a program: made, rotated while it is in use, revoked."""
    path = f"/v1/deployments/{deployment_id}"
    wish = {"name": "demo", "environment": "API_KEY_ENVIRONMENT_TEST", "permissions": ["deployments.get"]}
    made = await demo.json(demo.http.post("/v1/apiKeys", json={"apiKey": wish}, headers=ann))
    key_id, traffic = made["apiKey"]["id"], Traffic(demo.http, path, made["key"])
    seen = await demo.json(demo.http.get(path, headers=traffic.headers()))
    demo.check(seen["id"] == deployment_id, f"Ann made the key {key_id}: it reads {deployment_id}")
    refused = await demo.http.get("/v1/deployments", headers=traffic.headers())
    demo.check(refused.status_code == 403, f"and nothing else: {refused.json()['error']['message']}")
    await _rotate(demo, ann, key_id, traffic)
    await _revoke(demo, ann, key_id, traffic)


async def _rotate(demo: "Demo", ann: dict[str, str], key_id: str, traffic: Traffic) -> None:
    first, callers = traffic.key, [asyncio.create_task(traffic.caller(number)) for number in range(_CALLERS)]
    try:
        await asyncio.sleep(1)
        body = {"grace": f"{_GRACE_S}s", "requestId": str(uuid.uuid4())}
        traffic.key = (await demo.json(demo.http.post(f"/v1/apiKeys/{key_id}:rotate", json=body, headers=ann)))["key"]
        await asyncio.sleep(_GRACE_S + 1)
    finally:
        traffic.ended = True
        await asyncio.gather(*callers)
    moved = set(traffic.last.values()) == {traffic.key} != {first}
    said = f"rotated while {_CALLERS} callers used it: all moved to the new text, {traffic.calls} calls, {len(traffic.failures)} failed"
    demo.check(moved and not traffic.failures, said)
    old = await demo.http.get(traffic.path, headers={"authorization": f"Bearer {first}"})
    demo.check(old.status_code == 401, f"the old text ended after its {_GRACE_S} s of grace: {old.json()['error']['message']}")


async def _revoke(demo: "Demo", ann: dict[str, str], key_id: str, traffic: Traffic) -> None:
    await demo.json(demo.http.post(f"/v1/apiKeys/{key_id}:revoke", json={"reason": "the demo is over"}, headers=ann))
    started = time.monotonic()
    while (answer := await demo.http.get(traffic.path, headers=traffic.headers())).status_code == 200:
        if time.monotonic() - started > _REFUSED_WITHIN_S:
            raise DemoError("a revoked key still works")
        await asyncio.sleep(0.02)
    took = time.monotonic() - started
    demo.check(answer.status_code == 401, f"revoked: refused after {took * 1000:.0f} ms: {answer.json()['error']['message']}")


async def verify_audit(demo: "Demo") -> None:
    """Both services' logs, by the command that anybody can run; elsewhere it is only named."""
    is_usual = not demo.where.is_here or demo.where.data_dir == KitSettings().data_dir
    words = ["audit", "verify", *([] if is_usual else ["--data-dir", str(demo.where.data_dir)])]
    command = f"[bold]clawplane {' '.join(words)}[/]"
    if not demo.where.is_here:
        return demo.say(f"where the databases can be reached, {command} says whether the audit log is what was written")
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.cli", *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said = (await process.communicate())[0].decode().strip().splitlines()
    return demo.check(process.returncode == 0, f"{command}: {said[-1] if said else 'no answer'}")


async def _who_did_it(demo: "Demo", ann: dict[str, str]) -> None:
    """What the audit log says of the key."""
    me = await _whoami(demo, ann)
    query: dict[str, Any] = {"methodPrefix": "/clawplane.user.v1.ApiKeyService/"}

    async def check() -> list[dict[str, Any]] | None:
        found: list[dict[str, Any]] = (await demo.json(demo.http.get("/v1/auditEvents/account", params=query, headers=ann)))["events"]
        return found if all(int(event.get("sealNumber", 0)) for event in found) else None

    events = await until("the audit log to be sealed", check)
    of_ann = {event["method"] for event in events if event["actor"] == me.user_id}
    names = ", ".join(event["method"].rpartition("/")[2] for event in reversed(events))
    demo.check({_ROTATED, _REVOKED} <= of_ann, f"the audit log names {me.email} for {names}; each event is sealed")
