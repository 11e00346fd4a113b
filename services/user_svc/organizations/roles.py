"""What each role may do: the one table of roles and permissions."""

from clawplane.user.v1.organization_pb2 import Role

PERSONAL = frozenset(
    {
        "users.get", "users.update", "users.delete_self", "account.update", "sessions.list", "sessions.revoke", "organizations.create",
        "organizations.list", "organizations.undelete", "invitations.answer", "members.leave", "access.get",
    }
)  # fmt: skip
"""Of one's own account, whatever the organization: every member has them everywhere."""

_VIEWER = PERSONAL | frozenset(
    {
        "organizations.get", "members.list", "entitlements.get", "deployments.get", "deployments.list", "payments.list", "usage.read",
        "quotas.read",
    }
)  # fmt: skip
_DEVELOPER = _VIEWER | {
    "deployments.create", "deployments.update", "deployments.close", "usage.record", "usage.reserve", "models.call",
    "api_keys.create", "api_keys.get", "api_keys.list", "api_keys.update", "api_keys.revoke",
}  # fmt: skip
_ADMIN = _DEVELOPER | {
    "organizations.update", "members.update", "members.remove", "invitations.create", "invitations.list", "invitations.revoke",
    "api_keys.admin", "audit.list", "usage.state_cost",
}  # fmt: skip
_OWNER = _ADMIN | {"members.admin", "organizations.delete", "organizations.transfer"}

PERMISSIONS: dict[int, frozenset[str]] = {
    Role.ROLE_VIEWER: _VIEWER,
    Role.ROLE_DEVELOPER: _DEVELOPER,
    Role.ROLE_ADMIN: _ADMIN,
    Role.ROLE_OWNER: _OWNER,
}

OF_PEOPLE_ALONE = frozenset(
    {
        "users.update", "users.delete_self", "account.update", "sessions.list", "sessions.revoke", "organizations.create",
        "organizations.list", "organizations.undelete", "organizations.delete", "organizations.transfer", "invitations.answer",
        "members.leave", "members.admin", "api_keys.create", "api_keys.update", "api_keys.admin",
    }
)  # fmt: skip
"""Permissions that no key can be given: what is a person's own, and what would let a key make more of itself."""

OF_EVERY_KEY = frozenset({"access.get", "api_keys.revoke_self"})
"""What any key may do in this service, whatever it was given: say who it is, and end itself."""
