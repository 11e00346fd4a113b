"""Mail: once each, sealed while it waits, gone when it was given out; and what happens when the server does not want it."""

from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path

import pytest
import pytest_asyncio
import sqlalchemy as sa

from clawplane.user.v1 import mailbox_service_pb2
from clawplane.user.v1 import sign_in_service_pb2 as rpc
from services.kit.columns import now
from services.user_svc.mail.models import MailMessage
from services.user_svc.settings import UserSettings
from tests.conftest import Databases
from tests.harness import Stack, eventually, running
from tests.signing_in import Somebody, change, count
from tests.simulators.smtp import Mailboxes, mail_server
from tests.test_auth import code_of
from tests.test_secrets_stay_secret import everything_in

Posted = tuple[Stack, Mailboxes]


@pytest_asyncio.fixture(scope="module")
async def posted(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Posted]:
    """A stack that sends its mail to a server."""
    with mail_server() as mailboxes:
        user = {"smtp_host": "127.0.0.1", "smtp_port": mailboxes.port, "smtp_security": "none", "mail_from": "Claw Plane <post@claw.example>"}
        async with running(tmp_path_factory.mktemp("mail"), databases.make(), user=user) as stack:
            yield stack, mailboxes


async def ask(posted: Posted) -> Somebody:
    """Somebody who asks for a code."""
    somebody = Somebody(posted[0])
    await somebody.service.RequestCode(rpc.RequestCodeRequest(email=somebody.email), metadata=somebody.where)
    return somebody


async def arrives(posted: Posted, somebody: Somebody, timeout_s: float = 10) -> str:
    """The text of the mail to somebody."""

    async def check() -> str:
        return "".join(message.get_content().replace("\r\n", "\n") for to, message in posted[1].arrived if to == somebody.email)

    return str(await eventually(check, timeout_s))


async def test_a_mail_arrives_once_and_its_text_is_removed(posted: Posted) -> None:
    somebody = await ask(posted)
    text = await arrives(posted, somebody)
    (message,) = [message for to, message in posted[1].arrived if to == somebody.email]
    assert (message["From"], message["To"], message["Subject"]) == ("Claw Plane <post@claw.example>", somebody.email, "Your sign-in code")
    code = text.split("\n\n")[1].strip()
    assert len(code) == 6 and (await somebody.with_code(code)).token

    async def removed() -> bool:
        rows = await change(posted[0], sa.select(MailMessage.text_sealed, MailMessage.sent_at).where(MailMessage.to_address == somebody.email))
        return [(row[0], bool(row[1])) for row in rows] == [(None, True)]

    await eventually(removed)


async def test_what_the_server_puts_off_is_tried_again_and_what_it_refuses_is_not(posted: Posted) -> None:
    posted[1].answers.append("451 4.7.1 greylisted, try again later")
    late = await ask(posted)
    waits = MailMessage.to_address == late.email, MailMessage.problem.contains("451")
    await eventually(lambda: count(posted[0], MailMessage, *waits))
    stored = await everything_in(posted[0].urls["user_svc"])
    text = await arrives(posted, late)
    assert text.split("\n\n")[1].strip() not in stored
    posted[1].answers.append("550 5.1.1 no such mailbox")
    nobody = await ask(posted)
    refused = (MailMessage.to_address == nobody.email, MailMessage.problem.contains("550"), MailMessage.due_at.is_(None))
    await eventually(lambda: count(posted[0], MailMessage, *refused, MailMessage.text_sealed.is_(None)))
    assert not [to for to, _ in posted[1].arrived if to == nobody.email]


async def test_a_mail_that_expired_is_not_sent(posted: Posted) -> None:
    posted[1].answers.append("451 later")
    somebody = await ask(posted)
    await eventually(lambda: count(posted[0], MailMessage, MailMessage.to_address == somebody.email, MailMessage.attempts == 1))
    at = now()
    expired = sa.update(MailMessage).where(MailMessage.to_address == somebody.email).values(expires_at=at - timedelta(seconds=1), due_at=at)
    await change(posted[0], expired)
    await arrives(posted, await ask(posted))
    assert not [to for to, _ in posted[1].arrived if to == somebody.email]


async def test_with_a_server_there_is_no_mailbox_page(posted: Posted) -> None:
    call = posted[0].mailbox.ListMailMessages(mailbox_service_pb2.ListMailMessagesRequest(), metadata=posted[0].operator)
    assert (await code_of(call))[0].name == "UNIMPLEMENTED"


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
async def test_without_a_server_mail_is_shown_on_the_console_once_and_in_the_mailbox(
    databases: Databases, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(tmp_path, databases.make()) as stack:
        somebody = Somebody(stack)
        code = await somebody.ask()
        await eventually(lambda: count(stack, MailMessage, MailMessage.sent_at.is_not(None)))
        assert await somebody.newest_code() == code
        said = capsys.readouterr()
        assert said.out.count(code) == 1 and code not in said.err
        assert (await code_of(stack.mailbox.ListMailMessages(mailbox_service_pb2.ListMailMessagesRequest(), metadata=(await stack.person()).metadata)))[0].name == "PERMISSION_DENIED"


def test_settings_of_mail() -> None:
    assert UserSettings(environment="production").mail_mode == "off"
    assert UserSettings(environment="production", smtp_host="mail").mail_mode == "smtp"
    assert UserSettings().mail_mode == "console"
    for wrong in ({"mail_from": "nobody"}, {"smtp_username": "me", "smtp_security": "none"}):
        with pytest.raises(ValueError, match="CLAWPLANE_"):
            UserSettings(**wrong)
