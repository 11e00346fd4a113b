"""Which passwords are good enough."""

import re
import unicodedata

from zxcvbn import zxcvbn

LEAST, MOST = 12, 200
_LEAST_SCORE = 3
"""Of 0 to 4: from here on a guesser who has the hash needs more than a hundred million guesses."""
_LOOKED_AT = 64
"""Characters that the estimate looks at: its time grows faster than their number, and more of them make no password worse."""


def normal(password: str) -> str:
    """The form that is hashed: the same characters, whichever way a keyboard composes them."""
    return unicodedata.normalize("NFKC", password)


def problem(password: str, *about: str) -> str:
    """What is wrong with a new password, as an error says it; "" when nothing is. ``about``: what others know of its owner, such as the
    address and the name. Takes some milliseconds of CPU."""
    text = normal(password)
    if not LEAST <= len(text) <= MOST:
        return f"must have {LEAST} to {MOST} characters"
    known = [part for each in about for part in (each, each.partition("@")[0], *re.split(r"[\W_]+", each)) if len(part) > 2]
    # Also without what stands between the words: the estimate takes each of them for a word of its own.
    looked_at = [each[:_LOOKED_AT] for each in (text, re.sub(r"[\W_]+", "", text)) if len(each) >= LEAST]
    if min(zxcvbn(each, user_inputs=["clawplane", *known])["score"] for each in looked_at) < _LEAST_SCORE:
        return "is too easy to guess: take several words that do not belong together, or let a password manager make one"
    return ""
