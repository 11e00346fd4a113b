"""Signing in as people do: codes from their mail, each from a network of his own."""

import asyncio
import re
import secrets
from dataclasses import dataclass, field
from typing import Any

import grpc
import sqlalchemy as sa
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from sqlalchemy.ext.asyncio import create_async_engine

from clawplane.user.v1 import mailbox_service_pb2, session_pb2
from clawplane.user.v1 import sign_in_service_pb2 as rpc
from tests.harness import Metadata, Stack
from tests.processes import Processes

GOOD = "correct-Zebra7-lantern-quilt"
OK, UNAUTHENTICATED = grpc.StatusCode.OK, grpc.StatusCode.UNAUTHENTICATED
_CODE = re.compile(r"^    ([2-9A-Z]{6})$", re.MULTILINE)


def from_ip(stack: Stack, ip: str = "", agent: str = "Firefox/133.0") -> Metadata:
    """Metadata as the gateway sends it along for somebody at an address; without one, at an address of his own."""
    token = stack.signer("gateway").sign(["calls.forward"])
    ip = ip or "2001:db8:" + ":".join(secrets.token_hex(2) for _ in range(2)) + "::1"
    return (("clawplane-forwarded", token), ("clawplane-client-ip", ip), ("clawplane-client-agent", agent))


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    """Status code and reason of a call; (OK, "") when it went well."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]
        info = error_details_pb2.ErrorInfo()
        for detail in status.details if status is not None else ():
            detail.Unpack(info)
        return error.code(), info.reason
    return OK, ""


FAILED = (UNAUTHENTICATED, "SIGN_IN_FAILED")


@dataclass
class Somebody:
    """A person with an address and a browser."""

    stack: Stack
    email: str = field(default_factory=lambda: f"{secrets.token_hex(8)}@example.com")
    ip: str = ""

    def __post_init__(self) -> None:
        self.where = from_ip(self.stack, self.ip)
        self.service = self.stack.sign_in_service

    async def mail(self) -> list[Any]:
        """The mail of the address, newest first."""
        request = mailbox_service_pb2.ListMailMessagesRequest(to_address=self.email)
        return list((await self.stack.mailbox.ListMailMessages(request, metadata=self.stack.operator)).mail_messages)

    async def newest_code(self) -> str:
        """The code in the newest mail that has one."""
        codes = [found.group(1) for message in await self.mail() if (found := _CODE.search(message.text))]
        return codes[0] if codes else ""

    async def ask(self) -> str:
        """Asks for a code to sign in with, and reads it."""
        await self.service.RequestCode(rpc.RequestCodeRequest(email=self.email), metadata=self.where)
        return await self.newest_code()

    def with_code(self, code: str, where: Metadata = ()) -> Any:
        """The call that signs in with a code."""
        return self.service.SignInWithCode(rpc.SignInWithCodeRequest(email=self.email, code=code), metadata=where or self.where)

    def with_password(self, password: str = GOOD, where: Metadata = ()) -> Any:
        """The call that signs in with a password."""
        return self.service.SignIn(rpc.SignInRequest(email=self.email, password=password), metadata=where or self.where)

    async def sign_in(self) -> session_pb2.SignedIn:
        """Signs in with a code; makes the account with the first one."""
        answer: session_pb2.SignedIn = await self.with_code(await self.ask())
        return answer

    async def sign_up(self, password: str = GOOD) -> session_pb2.SignedIn:
        """Makes an account with a password."""
        up = await self.service.SignUp(rpc.SignUpRequest(email=self.email, password=password, full_name="Ada Example"), metadata=self.where)
        verify = rpc.VerifyEmailRequest(email=self.email, code=await self.newest_code(), sign_up_token=up.sign_up_token)
        answer: session_pb2.SignedIn = await self.service.VerifyEmail(verify, metadata=self.where)
        return answer

    def bearer(self, answer: session_pb2.SignedIn) -> Metadata:
        """The credential of a session, in the same place."""
        return (("authorization", f"Bearer {answer.token}"), *self.where)


def wrong(code: str) -> str:
    """A code that it is not."""
    return code[:-1] + ("2" if code[-1] != "2" else "3")


async def change(stack: Stack, statement: Any) -> Any:
    """Runs a statement on the user service's database: its rows, or how many it changed."""
    engine = create_async_engine(stack.urls["user_svc"])
    async with engine.begin() as connection:
        result = await connection.execute(statement)
        rows = result.all() if result.returns_rows else result.rowcount
    await engine.dispose()
    return rows


async def count(stack: Stack, model: Any, *where: Any) -> int:
    """How many rows a table has."""
    return int((await change(stack, sa.select(sa.func.count()).select_from(model).where(*where)))[0][0])


class UserProcesses(Processes):
    """Two user services on one database."""

    def part(self, number: int) -> str:
        return "user"


async def winners(calls: list[Any]) -> tuple[list[Any], set[Any]]:
    """The answers of those that went well, and how the others were refused."""
    answers = await asyncio.gather(*calls, return_exceptions=True)
    failed = {error.code() if isinstance(error, grpc.aio.AioRpcError) else error for error in answers if isinstance(error, BaseException)}
    return [answer for answer in answers if not isinstance(answer, BaseException)], failed
