"""The loop that gives mail out: to an SMTP server, or, in development without one, to the console."""

import asyncio
import random
from datetime import timedelta
from email.message import EmailMessage
from email.utils import formatdate, make_msgid, parseaddr

import aiosmtplib
import structlog
from sqlalchemy import update

from services.kit.columns import now
from services.kit.db import ALL, Database
from services.kit.loops import Loop, claim
from services.kit.secrets import SecretBox, SecretError
from services.user_svc.mail import repository
from services.user_svc.mail.models import MailMessage
from services.user_svc.settings import UserSettings

log = structlog.get_logger()
_EVERY_S = 0.5
_BATCH, _LEASE_S, _TIMEOUT_S = 10, 60.0, 15.0
_BACKOFF_S, _MOST_BACKOFF_S = 2.0, 300.0


class Sender:
    """Gives out what is due. A mail may arrive twice when a process dies at the wrong moment, but none is lost before it expires."""

    def __init__(self, db: Database, box: SecretBox, settings: UserSettings) -> None:
        self.db, self.box, self.settings = db, box, settings

    def loop(self) -> Loop:
        """The loop."""
        return Loop("mail", self.tick, _EVERY_S)

    async def tick(self) -> bool:
        """Sends a batch; True when there may be more."""
        if self.settings.mail_mode == "off":
            return False
        waiting = (MailMessage.sent_at.is_(None), MailMessage.expires_at > now())
        rows = await claim(self.db, MailMessage, limit=_BATCH, lease_s=_LEASE_S, where=waiting)
        await asyncio.gather(*(self._deliver(row) for row in rows))
        return len(rows) == _BATCH

    async def _deliver(self, row: MailMessage) -> None:
        try:
            text = repository.text_of(self.box, row)
            if self.settings.mail_mode == "console":
                _print(row, text)
            else:
                await self._send(row, text)
        except (aiosmtplib.SMTPException, SecretError, OSError, TimeoutError, ValueError) as error:
            await self._failed(row, error)
            return
        done = {"sent_at": now(), "due_at": None, "lease_until": None}
        await self._store(row, **done, **({} if self.settings.mail_mode == "console" else {"text_sealed": None}))

    async def _send(self, row: MailMessage, text: str) -> None:
        s = self.settings
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = s.mail_from, row.to_address, row.subject
        # The same at each attempt, so that a mailbox may see that two of them are one.
        message["Message-ID"] = make_msgid(row.id, _domain(s.mail_from))
        message["Date"] = formatdate()
        message["Auto-Submitted"] = "auto-generated"
        message.set_content(text)
        await aiosmtplib.send(
            message, hostname=s.smtp_host, port=s.smtp_port, username=s.smtp_username or None,
            password=s.smtp_password.get_secret_value() or None, timeout=_TIMEOUT_S,
            use_tls=s.smtp_security == "tls", start_tls=s.smtp_security == "starttls",
        )  # fmt: skip

    async def _failed(self, row: MailMessage, error: Exception) -> None:
        code = _code(error)
        problem = f"{type(error).__name__} {code or ''}".strip()[:100]
        for_good = code is not None and 500 <= code < 600
        log.warning("mail.failed", mail_id=row.id, attempts=row.attempts + 1, problem=problem, for_good=for_good)
        if for_good:
            await self._store(row, attempts=row.attempts + 1, problem=problem, due_at=None, text_sealed=None)
            return
        pause = min(_MOST_BACKOFF_S, _BACKOFF_S * 2**row.attempts) * random.uniform(0.8, 1.2)
        due = now() + timedelta(seconds=pause)
        await self._store(row, attempts=row.attempts + 1, problem=problem, due_at=due, lease_until=None)

    async def _store(self, row: MailMessage, **values: object) -> None:
        mine = (MailMessage.id == row.id, MailMessage.lease_token == row.lease_token)
        async with self.db.transaction(ALL) as session:
            await session.execute(update(MailMessage).where(*mine).values(**values).execution_options(synchronize_session=False))


def _print(row: MailMessage, text: str) -> None:
    """Shows a mail to whoever started the process. It is no line of the log, which must not hold a code."""
    print(f"\n--- mail to {row.to_address}: {row.subject}\n{text.rstrip()}\n---", flush=True)


def _code(error: Exception) -> int | None:
    """The number of a server's refusal; None when there was none."""
    if isinstance(error, aiosmtplib.SMTPRecipientsRefused):
        return max((one.code for one in error.recipients), default=None)
    return error.code if isinstance(error, aiosmtplib.SMTPResponseException) else None


def _domain(address: str) -> str:
    return parseaddr(address)[1].rpartition("@")[2] or "localhost"
