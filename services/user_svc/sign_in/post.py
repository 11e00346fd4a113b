"""Mailing codes."""

from dataclasses import dataclass

from sqlalchemy.ext.asyncio import AsyncSession

from services.kit.secrets import SecretBox
from services.user_svc.codes import repository as codes
from services.user_svc.codes.models import Purpose
from services.user_svc.mail import repository as mail
from services.user_svc.settings import UserSettings
from services.user_svc.sign_in import mails


@dataclass(frozen=True)
class Post:
    """Writes mails into the transaction that they are about."""

    settings: UserSettings
    box: SecretBox

    async def code(
        self, session: AsyncSession, purpose: Purpose, address: str, *, instead: mails.Mail | None = None,
        bound_to: str = "", details: str = "",
    ) -> None:  # fmt: skip
        """Makes a code and mails it, or another mail in its place: the code is then nobody's, but the work is the same."""
        code = await codes.make(session, self.box, purpose, address, bound_to=bound_to, details=details)
        # The operator of the embedded default signs in by links. Nobody owns that address, but everybody at that machine reads the mailbox.
        if self.settings.sign_in_links and address == self.settings.operator_email and purpose is not Purpose.STEP_UP:
            return
        await self.send(session, address, instead or mails.with_code(purpose, code))

    async def send(self, session: AsyncSession, address: str, message: mails.Mail) -> None:
        """Adds a mail; Unavailable where none is sent at all."""
        mail.check_sent(self.settings)
        subject, text = message
        await mail.send(session, self.box, to=address, subject=subject, text=text)
