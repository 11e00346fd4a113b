"""The hard edges, as steps of the demo: what is cancelled, replayed, deleted elsewhere, and watched through a restart."""

import asyncio
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc

from clawplane.deployment.v1 import deployment_pb2, deployment_service_pb2, deployment_service_pb2_grpc
from clawplane.user.v1 import user_service_pb2
from gateway.settings import GatewaySettings
from gateway.webhooks import clerk, standard
from services import embedded

if TYPE_CHECKING:
    from services.demo import Demo


async def cancel(demo: "Demo", person: dict[str, str]) -> None:
    """An order that is given up before it is paid."""
    d = await demo.order(person, f"111111111:{secrets.token_urlsafe(40)[:35]}")
    gone = await demo.json(demo.http.post(f"/v1/deployments/{d['id']}:cancel", json={}, headers=person))
    demo.check(gone["state"] == "STATE_CANCELED", "another order was cancelled before it was paid: CANCELED")


async def replay(demo: "Demo", deployment_id: str) -> None:
    """The payment's webhook, once more."""
    operator = dict(demo.operator)
    query: dict[str, Any] = {"source": demo.payment_provider, "pageSize": 100}
    listed = await demo.json(demo.http.get("/v1/webhook-events", params=query, headers=operator))
    (stored, *_) = [one for one in listed["events"] if (one.get("payload") or {}).get("deploymentId") == deployment_id]
    again = await demo.json(demo.http.post(f"/v1/webhook-events/{stored['id']}:replay", json={}, headers=operator))
    demo.check(again["reason"] == "already started on this payment", f"an operator replayed the webhook {stored['id']}: {again['reason']}")


async def deleted_at_clerk(demo: "Demo") -> None:
    """A user who comes and goes at Clerk; the going closes the bot."""
    clerk_id = f"user_{secrets.token_hex(12)}"
    email = {"id": "idn_1", "email_address": f"cleo.{secrets.token_hex(4)}@example.com", "verification": {"status": "verified"}}
    data = {"id": clerk_id, "email_addresses": [email], "primary_email_address_id": "idn_1", "first_name": "Cleo"}
    await _from_clerk(demo, "user.created", data)
    found = await demo.users.LookupUser(user_service_pb2.LookupUserRequest(clerk_user_id=clerk_id), metadata=demo.operator)
    demo.say(f"a signed webhook of Clerk made the user {found.username}")
    person = demo.acting(found.id)
    live = await demo.pay_and_wait(person, f"222222222:{secrets.token_urlsafe(40)[:35]}")
    await _from_clerk(demo, "user.deleted", {"id": clerk_id, "deleted": True})

    async def closed() -> bool | None:
        request = deployment_service_pb2.GetDeploymentRequest(id=live.id)
        return (await demo.deployments.GetDeployment(request, metadata=demo.operator)).state == deployment_pb2.STATE_CLOSED or None

    await demo.until("the bot of a deleted user to be CLOSED", closed)
    demo.say(f"Clerk deleted {found.username}: the bot is CLOSED")


async def _from_clerk(demo: "Demo", kind: str, data: dict[str, Any]) -> None:
    payload = json.dumps({"type": kind, "object": "event", "data": data, "timestamp": time.time_ns() // 1_000_000}).encode()
    message_id, now = f"msg_{secrets.token_hex(12)}", int(time.time())
    settings = embedded.load_settings(GatewaySettings, demo.where.data_dir)
    key = clerk.key_of(settings.clerk_webhook_secrets[0].get_secret_value())
    headers = {"svix-id": message_id, "svix-timestamp": str(now), "svix-signature": standard.sign(payload, key, message_id, now)}
    await demo.json(demo.http.post("/webhooks/clerk", content=payload, headers=headers | {"content-type": "application/json"}))


async def watch_through_a_restart(demo: "Demo", person: dict[str, str]) -> None:
    """A watch at a second server of the deployment service, which is restarted meanwhile."""
    metadata = tuple(person.items())
    async with _second_server(demo) as target:
        d = await demo.order(person, f"333333333:{secrets.token_urlsafe(40)[:35]}")
        seen = await _events(target, d["id"], "", metadata, "payment.link")
    await demo.json(demo.http.post(f"/v1/deployments/{d['id']}:cancel", json={}, headers=person))
    async with _second_server(demo) as target:
        rest = await _events(target, d["id"], seen[-1] if seen else "", metadata, "state.canceled")
    listed = await demo.json(demo.http.get(f"/v1/deployments/{d['id']}/events", headers=person))
    known = [event["id"] for event in listed["events"]]
    complete = known[-len(rest) :] == rest and known.index(rest[0]) == (known.index(seen[-1]) + 1 if seen else known.index(rest[0]))
    demo.check(complete, f"a watch was resumed after its server's restart: {len(rest)} events that it had missed, no gap")


@asynccontextmanager
async def _second_server(demo: "Demo") -> AsyncIterator[str]:
    port = demo.free_port()
    env = os.environ | {
        "CLAWPLANE_DATA_DIR": str(demo.where.data_dir), "CLAWPLANE_USER_TARGET": demo.where.user, "CLAWPLANE_LOG_LEVEL": "error",
        "CLAWPLANE_PUBLIC_URL": demo.where.http,
    } | (demo.world.env() if demo.world else {})  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.cli", "serve", "deployment", "--port", str(port), env=env,
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


async def _events(target: str, deployment_id: str, after: str, metadata: Any, last: str) -> list[str]:
    """The ids of the events after one, up to an event of the given kind that was or comes."""
    async with grpc.aio.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = deployment_service_pb2_grpc.DeploymentServiceStub(channel)
        everything = deployment_service_pb2.ListDeploymentEventsRequest(deployment_id=deployment_id, page_size=250)
        known = (await stub.ListDeploymentEvents(everything, metadata=metadata, wait_for_ready=True, timeout=30)).events
        if not after:
            return [event.id for event in known]
        request = deployment_service_pb2.WatchDeploymentRequest(id=deployment_id, after_event_id=after)
        found = []
        async with asyncio.timeout(20):
            async for message in stub.WatchDeployment(request, metadata=metadata, wait_for_ready=True):
                if message.HasField("event"):
                    found.append(message.event.id)
                    if message.event.kind == last:
                        break
        return found
