"""What each role may do: the one table of roles and permissions."""

from clawplane.user.v1.organization_pb2 import Role

_VIEWER = frozenset(
    {
        # One's own account, whatever the organization.
        "users.get", "users.update", "users.delete_self", "account.update", "sessions.list", "sessions.revoke", "organizations.create",
        "organizations.list", "invitations.answer", "members.leave",
        # What the organization has.
        "organizations.get", "members.list", "entitlements.get", "deployments.get", "deployments.list", "payments.list", "usage.read",
    }
)  # fmt: skip
_DEVELOPER = _VIEWER | {
    "deployments.create", "deployments.update", "deployments.close", "usage.record", "models.call",
    "api_keys.create", "api_keys.get", "api_keys.list", "api_keys.update", "api_keys.revoke",
}  # fmt: skip
_ADMIN = _DEVELOPER | {
    "organizations.update", "members.update", "members.remove", "invitations.create", "invitations.list", "invitations.revoke",
    "api_keys.admin", "audit.list",
}  # fmt: skip
_OWNER = _ADMIN | {"organizations.delete", "organizations.transfer"}

PERMISSIONS: dict[int, frozenset[str]] = {
    Role.ROLE_VIEWER: _VIEWER,
    Role.ROLE_DEVELOPER: _DEVELOPER,
    Role.ROLE_ADMIN: _ADMIN,
    Role.ROLE_OWNER: _OWNER,
}

OF_PEOPLE_ALONE = frozenset(
    {
        "users.update", "users.delete_self", "account.update", "sessions.list", "sessions.revoke", "organizations.create",
        "organizations.list", "organizations.delete", "organizations.transfer", "invitations.answer", "members.leave", "api_keys.create", "api_keys.admin",
    }
)  # fmt: skip
"""Permissions that no key can be given: what is a person's own, and what would let a key make more of itself."""
