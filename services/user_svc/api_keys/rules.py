"""What a key may be given: pure functions."""

from collections.abc import Iterable
from datetime import datetime

import orjson
from google.protobuf.json_format import MessageToDict

from clawplane.user.v1.api_key_pb2 import ApiKey
from services.kit.auth import Caller
from services.kit.errors import InvalidArgument
from services.user_svc.organizations.roles import OF_PEOPLE_ALONE

_MAX_JSON = 4 * 1024


def check(wish: ApiKey, fields: Iterable[str], caller: Caller, at: datetime) -> None:
    """InvalidArgument when a field that is written holds what it must not, or what the caller cannot give."""
    fields = set(fields)
    if "name" in fields and not wish.name.strip():
        raise InvalidArgument("api_key.name", "value is required")
    if "permissions" in fields:
        _check_permissions(wish.permissions, caller)
    if "expires_at" in fields and wish.HasField("expires_at") and wish.expires_at.ToDatetime(at.tzinfo) <= at:
        raise InvalidArgument("api_key.expires_at", "must be in the future; leave it out for a key that does not end by itself")
    if "metadata" in fields and len(orjson.dumps(MessageToDict(wish.metadata))) > _MAX_JSON:
        raise InvalidArgument("api_key.metadata", "must be at most 4 KiB as JSON")


def _check_permissions(permissions: Iterable[str], caller: Caller) -> None:
    """Nobody gives what he has not, and no key is given what would let it make more of itself."""
    wanted = set(permissions)
    if not wanted:
        raise InvalidArgument("api_key.permissions", 'name at least one, as "deployments.list": a key without any could do nothing')
    if personal := sorted(wanted & OF_PEOPLE_ALONE):
        raise InvalidArgument("api_key.permissions", f"{', '.join(personal)} is for people alone: no key can have it")
    if missing := sorted(one for one in wanted if not caller.may(one)):
        raise InvalidArgument("api_key.permissions", f"you do not have {', '.join(missing)} yourself: take it out")
