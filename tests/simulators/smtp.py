"""A mail server that keeps what it is given, and refuses when told to."""

from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any, cast

from aiosmtpd.controller import Controller

from tests.harness import free_port


class Mailboxes:
    """What has arrived, and the answers that stand in for the next deliveries."""

    def __init__(self) -> None:
        self.arrived: list[tuple[str, EmailMessage]] = []
        """(recipient of the envelope, message)."""
        self.answers: list[str] = []
        """Given, one each, instead of taking a message: "451 try again later"."""
        self.port = 0

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        """The protocol's DATA."""
        if self.answers:
            return self.answers.pop(0)
        message = cast(EmailMessage, message_from_bytes(envelope.content, policy=policy.default))
        self.arrived += [(recipient, message) for recipient in envelope.rcpt_tos]
        return "250 taken"


@contextmanager
def mail_server() -> Iterator[Mailboxes]:
    """Runs one in a thread of its own."""
    mailboxes = Mailboxes()
    mailboxes.port = free_port()
    controller = Controller(mailboxes, hostname="127.0.0.1", port=mailboxes.port)
    controller.start()
    try:
        yield mailboxes
    finally:
        controller.stop()
