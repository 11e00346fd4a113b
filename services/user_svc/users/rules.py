"""Pure rules about users."""

import re
from collections.abc import Collection


def normal_email(email: str) -> str:
    """The form in which addresses are stored and compared."""
    return email.strip().lower()


def username_from(email: str) -> str:
    """A username made from an address: "Ann.Lee+x@b.c" -> "ann-lee-x"."""
    base = re.sub(r"[^a-z0-9_]+", "-", normal_email(email).partition("@")[0]).strip("-_")[:40]
    return base if len(base) >= 3 else f"{base or 'user'}-user"


def free_username(base: str, taken: Collection[str]) -> str:
    """The base, or the base with the first number that is not taken."""
    if base not in taken:
        return base
    number = 2
    while f"{base}-{number}" in taken:
        number += 1
    return f"{base}-{number}"
