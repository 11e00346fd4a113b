"""``clawplane demo``: the whole loop, once, against a running stack or one of its own."""

import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import grpc
import httpx
from rich.console import Console

from clawplane.deployment.v1 import (
    blacklist_service_pb2,
    blacklist_service_pb2_grpc,
    deployment_pb2,
    deployment_service_pb2,
    deployment_service_pb2_grpc,
    usage_service_pb2,
    usage_service_pb2_grpc,
)
from clawplane.user.v1 import mailbox_service_pb2_grpc, user_pb2, user_service_pb2, user_service_pb2_grpc
from services import demo_akash as akash
from services import demo_edges as edges
from services import demo_identity as identity
from services import demo_usage as metering
from services import embedded
from services.demo_stack import DemoError, Where, free_ports, own_stack, stack, until
from services.kit.settings import KitSettings
from services.kit.tokens import TokenSigner

T = TypeVar("T")


async def run_demo(where: Where | Path, out: Console, *, on_akash: bool = False) -> int:
    """Runs the demo against a stack, or whatever runs on a data directory, and returns the exit status. ``on_akash``: against a stack of
    its own on simulators of Akash and Polar."""
    try:
        if on_akash:
            async with akash.simulators() as world, own_stack(out, world.env()) as found:
                await Demo(found, out, world).run()
        elif isinstance(where, Where):
            await Demo(where, out).run()
        else:
            async with stack(where, out) as found:
                await Demo(found, out).run()
    except ModuleNotFoundError:
        out.print("[red]✗ the simulators are in the source tree: run this there, as make demo ARGS=--akash-simulator[/]")
        return 1
    except (DemoError, grpc.aio.AioRpcError, httpx.HTTPError) as error:
        text = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else str(error) or repr(error)
        out.print(f"[red]✗ {text}[/]")
        return 1
    return 0


class Demo:
    """One run: a customer's way through the gateway, and an operator's through gRPC."""

    def __init__(self, where: Where, out: Console, world: akash.Akash | None = None) -> None:
        self.where, self.out, self.world = where, out, world
        self.payment_provider = "polar" if world else "sandbox"
        settings = embedded.load_settings(KitSettings, where.data_dir)
        self.signer = TokenSigner(settings)
        self.operator = (("authorization", f"Bearer {settings.operator_token.get_secret_value()}"),)

    @staticmethod
    def free_port() -> int:
        """A port that nobody listens on."""
        return free_ports()[0]

    @staticmethod
    async def until(what: str, check: Callable[[], Awaitable[T | None]]) -> T:
        """Waits for something."""
        return await until(what, check)

    def check(self, good: bool, text: str) -> None:
        """Says it when it is so; DemoError when it is not."""
        if not good:
            raise DemoError(f"not so: {text}")
        self.say(text)

    def say(self, text: str) -> None:
        """One line for a step that is done."""
        self.out.print(f"[green]✓[/] {text}", soft_wrap=True)

    async def run(self) -> None:
        """Every step, in order."""
        direct = [("grpc.enable_http_proxy", 0)]
        to_users, channel = (grpc.aio.insecure_channel(target, direct) for target in (self.where.user, self.where.deployment))
        async with to_users, channel, httpx.AsyncClient(base_url=self.where.http, trust_env=False, timeout=30) as http:
            self.http, self.to_users = http, to_users
            self.users = user_service_pb2_grpc.UserServiceStub(to_users)
            self.deployments = deployment_service_pb2_grpc.DeploymentServiceStub(channel)
            self.usage = usage_service_pb2_grpc.UsageServiceStub(channel)
            self.blacklist = blacklist_service_pb2_grpc.BlacklistServiceStub(channel)
            if self.world:
                await self.world.prepare(self)
            mailbox = await self._mailbox(to_users)
            ann = await identity.sign_in(self, mailbox, "Ann") if mailbox else await self.person("Ann")
            bob = await self.person("Bob")
            first = await self._order_and_pay(ann)
            live = await self._live(ann, first)
            if mailbox:
                await identity.run(self, mailbox, ann, live.id)
            if self.world:
                await self.world.report(self, live)
            await self._chat(live)
            await self._summary(ann, live)
            await metering.run(self, channel)
            second = await self._elsewhere(bob, live.provider)
            await edges.replay(self, live.id)
            dan = await self.person("Dan")
            await edges.cancel(self, dan)
            await edges.watch_through_a_restart(self, dan)
            await edges.deleted_at_clerk(self)
            await self._close(ann, live)
            await self._close(bob, second)
            if self.world:
                await self.world.close(self)
            await identity.verify_audit(self)

    async def _mailbox(self, channel: grpc.aio.Channel) -> identity.Mailbox | None:
        mailbox = identity.Mailbox(mailbox_service_pb2_grpc.MailboxServiceStub(channel), self.operator)
        if await mailbox.is_open():
            return mailbox
        self.say("no mailbox here, so nobody signs in: the demo acts for people with tokens that it signs itself")
        return None

    async def person(self, name: str) -> dict[str, str]:
        wish = user_pb2.User(email=f"{name.lower()}.{secrets.token_hex(4)}@example.com", full_name=name)
        user = await self.users.CreateUser(user_service_pb2.CreateUserRequest(user=wish), metadata=self.operator)
        self.say(f"user {user.username} with an organization of their own ({user.personal_org_id})")
        return self.acting(user.id)

    def acting(self, user_id: str) -> dict[str, str]:
        """Headers that act for a user."""
        return {"authorization": f"Bearer {self.signer.sign(['*'], user=user_id)}"}

    async def order(self, person: dict[str, str], token: str) -> dict[str, Any]:
        """A Telegram bot, ordered through the gateway."""
        body = {"model": "claude-opus-4.5", "channel": "CHANNEL_TELEGRAM", "channelToken": token}
        return await self.json(self.http.post("/v1/deployments", json=body, headers=person))

    async def _order_and_pay(self, person: dict[str, str]) -> dict[str, Any]:
        token = f"123456789:{secrets.token_urlsafe(40)[:35]}"
        first = await self.order(person, token)
        self.say(f"ordered {first['id']} for ${int(first['priceMinor']) / 100:.2f}: {first['paymentUrl']}")
        again = await self.order(person, token)
        if (again["id"], again["paymentUrl"]) != (first["id"], first["paymentUrl"]):
            raise DemoError("a duplicate click made a second deployment or page")
        self.say("a duplicate click got the same deployment and the same payment page")
        await self._pay(first)
        return first

    async def _pay(self, d: dict[str, Any]) -> None:
        if self.world:
            return self.say(await self.world.pay(d))
        answer = await self.http.post(f"{urlsplit(d['paymentUrl']).path}/pay", headers={"accept": "application/json"})
        if answer.status_code != 200:
            raise DemoError(f"paying answered {answer.status_code}: {answer.text}")
        self.say("paid on the sandbox page; the signed webhook went through the gateway")
        return None

    async def pay_and_wait(self, person: dict[str, str], token: str) -> deployment_pb2.Deployment:
        """A bot that is ordered, paid and ACTIVE."""
        d = await self.order(person, token)
        await self._pay(d)
        return await self._live(person, d)

    async def _live(self, person: dict[str, str], d: dict[str, Any]) -> deployment_pb2.Deployment:
        seen: set[int] = set()

        async def check() -> deployment_pb2.Deployment | None:
            now = await self._get(person, d["id"])
            if now.state == deployment_pb2.STATE_DEPLOYING and now.state not in seen:
                self.say("DEPLOYING: looking for a provider")
            seen.add(now.state)
            return now if now.state == deployment_pb2.STATE_ACTIVE else None

        live = await until("the bot to be ACTIVE", check)
        if deployment_pb2.STATE_DEPLOYING not in seen:
            self.say("DEPLOYING: was over before we looked")
        self.say(f"ACTIVE at {live.provider}: {live.provider_url}")
        return live

    async def _get(self, person: dict[str, str], deployment_id: str) -> deployment_pb2.Deployment:
        request = deployment_service_pb2.GetDeploymentRequest(id=deployment_id)
        return await self.deployments.GetDeployment(request, metadata=tuple(person.items()))

    async def _chat(self, live: deployment_pb2.Deployment) -> None:
        async with httpx.AsyncClient(trust_env=False, timeout=10) as bot:
            for text in ("Hello! Who are you?", "What can you do for me?"):
                reply = await self.json(bot.post(f"{live.provider_url}/chat", json={"message": text}))
                self.say(f"chat: {text} [dim]→ {reply['reply']}[/]")

    async def _summary(self, person: dict[str, str], live: deployment_pb2.Deployment) -> None:
        request = usage_service_pb2.SummarizeUsageRequest(
            group_by=[usage_service_pb2.USAGE_GROUP_DAY, usage_service_pb2.USAGE_GROUP_MODEL], deployment_id=live.id
        )

        async def check() -> usage_service_pb2.SummarizeUsageResponse | None:
            found = await self.usage.SummarizeUsage(request, metadata=tuple(person.items()))
            return found if found.total.events == 2 else None

        found = await until("the bot's usage to be counted", check)
        self.say(f"usage: the model endpoint counted {found.total.events} calls of the bot, {found.total.tokens_total} tokens")
        for row in found.sums:
            self.say(f"summary: {row.day} {row.model}: {row.tokens_in} in, {row.tokens_out} out, {row.cost} {row.currency.upper()}")

    async def _elsewhere(self, person: dict[str, str], provider: str) -> deployment_pb2.Deployment:
        add = blacklist_service_pb2.AddBlacklistEntryRequest(provider_address=provider, reason="demo")
        await self.blacklist.AddBlacklistEntry(add, metadata=self.operator)
        try:
            self.say(f"an operator blacklisted {provider}")
            live = await self.pay_and_wait(person, f"987654321:{secrets.token_urlsafe(40)[:35]}")
            if live.provider == provider:
                raise DemoError("the blacklisted provider was chosen again")
            self.say(f"the next bot went elsewhere: {live.provider}")
            return live
        finally:
            remove = blacklist_service_pb2.RemoveBlacklistEntryRequest(provider_address=provider)
            await self.blacklist.RemoveBlacklistEntry(remove, metadata=self.operator)

    async def _close(self, person: dict[str, str], live: deployment_pb2.Deployment) -> None:
        await self.json(self.http.post(f"/v1/deployments/{live.id}:close", json={}, headers=person))

        async def check() -> bool | None:
            return (await self._get(person, live.id)).state == deployment_pb2.STATE_CLOSED or None

        await until("the bot to be CLOSED", check)
        async with httpx.AsyncClient(trust_env=False, timeout=2) as bot:
            try:
                await bot.get(f"{live.provider_url}/health")
            except httpx.TransportError:
                self.say(f"CLOSED: nothing answers at {live.provider_url} any more")
                return
        raise DemoError("the bot still answers after it was closed")

    async def json(self, request: Awaitable[httpx.Response]) -> dict[str, Any]:
        """The answer of the gateway or a bot; DemoError when it is an error."""
        answer = await request
        if answer.is_error:
            raise DemoError(f"{answer.request.method} {answer.request.url.path} answered {answer.status_code}: {answer.text}")
        found: dict[str, Any] = answer.json()
        return found
