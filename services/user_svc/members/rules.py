"""Who may change whom: pure rules about roles, which are numbered from the lowest to the highest."""

from clawplane.errors.v1.errors_pb2 import ErrorReason
from clawplane.user.v1.organization_pb2 import Role
from services.kit.errors import InvalidState, PermissionDenied

ADMIN = "members.admin"
"""The permission to change admins."""


def check_touch(own: int, theirs: int, *, is_self: bool) -> None:
    """Whether a member of the role ``own`` may change or remove one of the role ``theirs``: anybody himself, the owner everybody, an
    admin whoever is below. InvalidState for the owner, PermissionDenied otherwise."""
    if theirs == Role.ROLE_OWNER:
        raise InvalidState("the owner stays as he is until he hands over", reason=ErrorReason.ERROR_REASON_OWNER_REQUIRED)
    if not is_self and theirs >= own:
        raise PermissionDenied(ADMIN)


def check_grant(own: int, wanted: int) -> None:
    """Whether a member of the role ``own`` may give a role, to others or himself: none above his own, and never the owner's.
    PermissionDenied otherwise."""
    if wanted > own or wanted >= Role.ROLE_OWNER:
        raise PermissionDenied(ADMIN)
