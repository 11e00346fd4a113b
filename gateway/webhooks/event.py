"""What every sender's webhooks have in common, whoever signs them."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

MAX_INT64 = 2**63 - 1
EXTERNAL_ID = re.compile(r"[!-~]{1,255}\Z")
TYPE = re.compile(r"[a-z0-9_.]{1,100}\Z")
CURRENCY = re.compile(r"[a-z]{3}\Z")
DEPLOYMENT_ID = re.compile(r"dep_[0-9a-f]{32}\Z")


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


def mapping(value: Any, name: str) -> Mapping[str, Any]:
    """An object; BadEvent, as for the others, names what is not as it should be."""
    if not isinstance(value, dict):
        raise BadEvent(f"{name}: must be an object")
    return value


def match(value: Any, pattern: re.Pattern[str], name: str) -> str:
    """A text of a form."""
    if not isinstance(value, str) or not pattern.match(value):
        raise BadEvent(f"{name}: is missing or malformed")
    return value


def integer(value: Any, name: str, greatest: int = MAX_INT64) -> int:
    """A whole number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= greatest:
        raise BadEvent(f"{name}: must be a whole number that is not negative")
    return value


def boolean(value: Any, name: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise BadEvent(f"{name}: must be true or false")
    return value


def is_deployment_id(value: Any) -> bool:
    """Whether a value is an id of one of our deployments."""
    return isinstance(value, str) and DEPLOYMENT_ID.match(value) is not None
