"""docs/security.md against the standard's numbers, the tests, the contracts and the code: it names what exists, and forgets nothing."""

import ast
import re
from datetime import timedelta
from functools import cache
from pathlib import Path

from google.protobuf.descriptor import MethodDescriptor

from clawplane.options.v1 import options_pb2
from services.kit import auth
from services.user_svc.codes import repository as codes
from services.user_svc.codes import rules as code_rules
from services.user_svc.invitations import repository as invitations
from services.user_svc.passwords import rules as passwords
from services.user_svc.sessions import repository as sessions
from services.user_svc.settings import UserSettings
from services.user_svc.sign_in import limits
from services.user_svc.sign_in_links import service as links
from tests.test_contract import methods

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "security.md").read_text()

SECTIONS = {
    "6.1": 3, "6.2": 12, "6.3": 4, "6.4": 4, "6.5": 5, "6.6": 3, "6.8": 4, "7.1": 3, "7.2": 4, "7.3": 2, "7.4": 5, "7.5": 2, "7.6": 2,
    "8.1": 2, "8.2": 3, "8.3": 1, "8.4": 1, "9.1": 3, "9.2": 4, "10.1": 2, "10.2": 2, "10.3": 4, "10.4": 11, "10.5": 5, "10.6": 2, "10.7": 3,
}  # fmt: skip
"""How many items of levels 1 and 2 each section of version 5.0.0 has. They stand first in it; what follows is of level 3."""
FIRST_LEVEL = {
    "6.1.1", "6.2.1", "6.2.2", "6.2.3", "6.2.4", "6.2.5", "6.2.6", "6.2.7", "6.2.8", "6.3.1", "6.3.2", "6.4.1", "6.4.2",
    "7.2.1", "7.2.2", "7.2.3", "7.2.4", "7.4.1", "7.4.2", "8.1.1", "8.2.1", "8.2.2", "8.3.1", "9.1.1", "9.1.2", "9.1.3", "9.2.1",
    "10.4.1", "10.4.2", "10.4.3", "10.4.4", "10.4.5",
}  # fmt: skip
NUMBERS = [f"{section}.{number}" for section, count in SECTIONS.items() for number in range(1, count + 1)]
STATES = ("met", "partly", "not met", "does not apply")
TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows() -> list[list[str]]:
    """The rows of the items: number, level, what is asked, what is done, tests."""
    found = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in TEXT.splitlines() if re.match(r"\| \d", line)]
    return [row for row in found if re.fullmatch(r"\d+\.\d+\.\d+", row[0])]


def name(method: MethodDescriptor) -> str:
    """As the page names it."""
    return f"{method.containing_service.name}.{method.name}"


@cache
def functions_of(path: str) -> frozenset[str]:
    """The functions of a file."""
    return frozenset(node.name for node in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_item_stands_there_once() -> None:
    assert [row[0] for row in rows()] == NUMBERS
    assert all(int(row[1]) == (1 if row[0] in FIRST_LEVEL else 2) for row in rows())


def test_every_item_says_how_it_stands_and_what_shows_it() -> None:
    for number, _, asks, done, shown in rows():
        state = re.match(r"\*\*([a-z ]+)\*\*(: \S.*)?$", done)
        assert asks and state and state[1] in STATES, number
        assert state[1] == "met" or state[2], f"{number}: what is missing, or why it does not apply"
        assert TEST.search(shown) or state[1] in ("not met", "does not apply"), f"{number}: which test shows it?"


def test_what_is_named_exists() -> None:
    tests = TEST.findall(TEXT)
    assert len(tests) > 60
    for path, test in tests:
        assert test.startswith("test_") and test in functions_of(path), f"{path}::{test}"
    for path in re.findall(r"`((?:services|gateway|tests|docs)/[\w/]+\.\w+)`", TEXT):
        assert (ROOT / path).is_file(), path
    known = {name(method) for method in methods()}
    named = set(re.findall(r"`(\w+Service\.\w+)`", TEXT))
    assert named <= known, named - known
    services = {one.partition(".")[0] for one in known}
    assert set(re.findall(r"`(\w+Service)`", TEXT)) <= services
    anchors = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-") for line in TEXT.splitlines() if line.startswith("#")}
    assert set(re.findall(r"\(#([\w-]+)\)", TEXT)) <= anchors


def test_every_way_to_a_session_is_named() -> None:
    """Every RPC whose answer holds a session's token, every public one, and every one that asks for a fresh sign-in."""
    ways, rest = TEXT.split("## How signing in is limited")
    fresh = rest.split("## What asks for a fresh sign-in")[1].split("## Passwords")[0]
    for method in methods():
        rule, fields = method.GetOptions().Extensions[options_pb2.rule], method.output_type.fields_by_name
        if {"session", "token"} <= set(fields):
            assert f"`{name(method)}`" in ways, name(method)
        if rule.audience == options_pb2.AUDIENCE_PUBLIC:
            assert f"`{name(method)}`" in TEXT, name(method)
        if rule.fresh:
            assert f"`{name(method)}`" in fresh, name(method)
    table = re.findall(r"^\| `(\w+\.\w+)` \|", ways, re.MULTILINE)
    makes = {name(method) for method in methods() if {"session", "token"} <= set(method.output_type.fields_by_name)}
    assert set(table) == makes


def test_limits_are_those_of_the_code() -> None:
    settings = UserSettings.model_fields
    minutes = [span.total_seconds() / 60 for span in (codes.LIFETIME, limits.CODES, limits.LOCK, links.LIFETIME)]
    assert (minutes, codes.TRIES) == ([10, 10, 15, 10], 3)
    assert [limits._ASKED.most, limits._TRIED.most, limits._PASSWORD.most, limits._PASSWORD_ANYWHERE.most] == [5, 3, 5, 50]
    assert sessions.LIFETIME == invitations.LIFETIME == timedelta(days=7)
    assert (auth.FRESH_S, settings["session_idle_s"].default) == (3600, 3 * 86400)
    assert len(code_rules.ALPHABET) ** code_rules.LENGTH == 729_000_000
    assert (passwords.LEAST, passwords.MOST, auth.MAX_LIFETIME_S) == (12, 200, 900)
    argon2 = [settings[f"password_{part}"].default for part in ("memory_kib", "time_cost", "lanes")]
    assert argon2 == [64 * 1024, 3, 4] and settings["sign_ins_per_network"].default == 100
    assert settings["public_rate_limit"].default == "600/minute" and settings["failed_rate_limit"].default == "60/minute"
    for words in (
        "3 for each code; 3 in 10 minutes", "5 failures in 15 minutes", "50 failures in 15 minutes", "100 in 15 minutes", "600 a minute",
        "60 a minute", "12 to 200 characters", "64 MiB, 3 passes, 4 lanes",
        "| 7 days |", "| 3 days (", "| 1 hour |", "at most 15 minutes",
    ):  # fmt: skip
        assert words in TEXT, words
