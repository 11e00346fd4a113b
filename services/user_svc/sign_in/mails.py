"""What the mails of signing in say. Nothing that somebody else has typed is in them."""

from services.user_svc.codes.models import Purpose

Mail = tuple[str, str]
"""(subject, text)."""

_WHAT = {
    Purpose.SIGN_IN: ("Your sign-in code", "to sign in to Clawplane"),
    Purpose.VERIFY_EMAIL: ("Your code to confirm your address", "to confirm your address and finish your Clawplane account"),
    Purpose.STEP_UP: ("Your confirmation code", "to confirm that it is you"),
    Purpose.RESET_PASSWORD: ("Your code to set a new password", "to set a new password for your Clawplane account"),
}
_NOT_YOU = "If this was not you, ignore this mail: without the code nothing happens. Never give the code to anyone."
_IGNORE = "If this was not you, ignore this mail."


def with_code(purpose: Purpose, code: str) -> Mail:
    """A code. It stands in the text alone, for subjects show on locked screens."""
    subject, what = _WHAT[purpose]
    return subject, f"Your code {what} is\n\n    {code}\n\nIt holds for 10 minutes and works once.\n\n{_NOT_YOU}\n"


def account_exists(url: str) -> Mail:
    """To an address that has an account and was signed up once more."""
    text = f"Somebody, perhaps you, asked for a Clawplane account with this address. It has one already: sign in at\n\n    {_page(url)}\n"
    return "You already have an account", f"{text}\nA forgotten password can be set anew there. {_IGNORE}\n"


def no_account(url: str) -> Mail:
    """To an address without an account whose password was to be reset."""
    text = "Somebody, perhaps you, asked for a new password for a Clawplane account with this address. There is no such account."
    return "There is no account with this address", f"{text} Make one at\n\n    {_page(url)}\n\n{_IGNORE}\n"


def password_changed(url: str) -> Mail:
    """After a password was set or changed."""
    text = "The password of your Clawplane account was changed just now, and your other sessions were ended."
    return "Your password was changed", f"{text}\n\nIf this was not you, set a new one at once at\n\n    {_page(url)}\n"


def _page(url: str) -> str:
    return f"{url}/dashboard/sign-in"
