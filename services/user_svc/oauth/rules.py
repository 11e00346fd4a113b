"""Where a browser may be sent, and what identities say."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

HOME = "/dashboard"


@dataclass(frozen=True)
class Profile:
    """Who somebody is at a provider."""

    provider: str
    subject: str
    """The identifier there, which never changes hands."""
    email: str
    """Only an address that the provider has verified; empty otherwise."""
    full_name: str = ""
    avatar_url: str = ""
    github_username: str = ""


def own_path(path: str) -> str:
    """The path, if it is one of the dashboard's pages; its first page otherwise. No other site can be meant by what comes out."""
    is_own = path.startswith(HOME) and path[len(HOME) : len(HOME) + 1] in ("", "/", "?")
    safe = "//" not in path and "\\" not in path and path.isprintable() and path.isascii()
    return path if is_own and safe else HOME


def of_google(claims: Mapping[str, Any]) -> Profile:
    """From Google's ID token."""
    email = _text(claims, "email", 254) if claims.get("email_verified") is True else ""
    return Profile("google", _text(claims, "sub", 255), email, _text(claims, "name", 200), _picture(claims.get("picture")))


def of_microsoft(claims: Mapping[str, Any]) -> Profile:
    """From Microsoft's ID token: tenant and object together are the person. A tenant's administrator can write any address there; it counts
    only with the claim that Microsoft has verified who owns its domain."""
    tenant, person = _text(claims, "tid", 100), _text(claims, "oid", 100)
    verified = claims.get("xms_edov") in (True, 1, "1", "true", "True")
    email = _text(claims, "email", 254) if verified else ""
    return Profile("microsoft", f"{tenant}:{person}" if tenant and person else "", email, _text(claims, "name", 200))


def of_github(user: Mapping[str, Any], emails: Any) -> Profile:
    """From GitHub's user and addresses: the primary one, if it is verified."""
    number = user.get("id")
    found = [one for one in emails if isinstance(one, dict) and one.get("primary") is True and one.get("verified") is True]
    email = _text(found[0], "email", 254) if found else ""
    subject = str(number) if isinstance(number, int) and not isinstance(number, bool) and number > 0 else ""
    return Profile("github", subject, email, _text(user, "name", 200), _picture(user.get("avatar_url")), _text(user, "login", 39))


def _text(source: Mapping[str, Any], name: str, most: int) -> str:
    """A text that fits; empty for anything else. U+0000 is none that a database takes."""
    value = source.get(name)
    return value.strip() if isinstance(value, str) and len(value) <= most and "\0" not in value else ""


def _picture(url: Any) -> str:
    return url if isinstance(url, str) and url.startswith("https://") and len(url) <= 2048 else ""
