"""How codes look."""

import re
import secrets

ALPHABET = "23456789ABCDEFGHJKMNPQRSTVWXYZ"
"""Nothing that is taken for something else, and no U, so that fewer words come out."""
LENGTH = 6
_FILLING = re.compile(r"[\s-]+")


def new_code() -> str:
    """A random code: one of 729 million."""
    return "".join(secrets.choice(ALPHABET) for _ in range(LENGTH))


def normal(text: str) -> str:
    """A code as it was typed, in the form in which it was made: capitals, without spaces and dashes. "" for what can be no code."""
    code = _FILLING.sub("", text).upper()
    return code if len(code) == LENGTH and all(each in ALPHABET for each in code) else ""
