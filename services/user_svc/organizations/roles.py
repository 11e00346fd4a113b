"""What each role may do: the one table of roles and permissions."""

from clawplane.user.v1.organization_pb2 import Role

_VIEWER = frozenset(
    {
        "users.get", "users.update", "sessions.revoke", "entitlements.get", "deployments.get", "deployments.list", "payments.list",
        "usage.read",
    }
)  # fmt: skip
_DEVELOPER = _VIEWER | {"deployments.create", "deployments.update", "deployments.close", "usage.record", "models.call"}

PERMISSIONS: dict[int, frozenset[str]] = {
    Role.ROLE_VIEWER: _VIEWER,
    Role.ROLE_DEVELOPER: _DEVELOPER,
    Role.ROLE_ADMIN: _DEVELOPER,
    Role.ROLE_OWNER: _DEVELOPER,
}
