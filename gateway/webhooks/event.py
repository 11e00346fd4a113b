"""What every sender's webhooks have in common, whoever signs them."""

import dataclasses


class BadSignature(Exception):
    """The request was not signed by someone we know, or not now."""


class BadEvent(Exception):
    """The request is signed, and does not have the form of an event."""


@dataclasses.dataclass(frozen=True)
class Ignore:
    """An event that nobody handles."""

    external_id: str
    type: str
    reason: str
