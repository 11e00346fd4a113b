"""Writing mail, and reading what it says."""

from datetime import timedelta

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.errors.v1.errors_pb2 import ErrorReason
from services.kit import ids
from services.kit.columns import now
from services.kit.errors import Unavailable
from services.kit.secrets import SecretBox
from services.user_svc.mail.models import MailMessage
from services.user_svc.settings import UserSettings

KEPT = timedelta(hours=1)
"""How long a mail is tried, and kept where none is sent: most of them speak of codes that end sooner."""
_MOST_SUBJECT = 200


def check_sent(settings: UserSettings) -> None:
    """Unavailable where no mail is sent at all: whoever waits for one should know."""
    if settings.mail_mode == "off":
        raise Unavailable(
            "this installation sends no mail: its operator has set no CLAWPLANE_SMTP_HOST", 3600,
            reason=ErrorReason.ERROR_REASON_DEPENDENCY_UNAVAILABLE,
        )  # fmt: skip


async def send(session: AsyncSession, box: SecretBox, *, to: str, subject: str, text: str, kept: timedelta = KEPT) -> MailMessage:
    """Adds a mail to the transaction; it goes out once that has committed, within a second or two. ``kept``: for how long it is tried.
    ``subject`` is brought to one line of at most 200 characters."""
    message = MailMessage(id=ids.new("mail"), to_address=to, subject=" ".join(subject.split())[:_MOST_SUBJECT])
    message.text_sealed = box.seal(text, place(message))
    message.due_at, message.expires_at = now(), now() + kept
    session.add(message)
    await session.flush()
    return message


def text_of(box: SecretBox, message: MailMessage) -> str:
    """What a mail says; empty once it was removed."""
    return box.open(message.text_sealed, place(message)) if message.text_sealed else ""


def newest(to_address: str) -> Select[MailMessage]:
    """The mail to an address ("" for all) that is kept."""
    statement = select(MailMessage).where(MailMessage.expires_at > now())
    return statement.where(MailMessage.to_address == to_address.strip().lower()) if to_address else statement


def place(message: MailMessage) -> str:
    """What the text is bound to."""
    return f"mail_messages/text/{message.id}"
