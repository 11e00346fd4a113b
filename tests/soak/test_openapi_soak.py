"""Ten minutes of Schemathesis, as a person and as an operator."""

import pytest

from tests.harness import Stack
from tests.test_openapi import break_it

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]


@pytest.mark.parametrize("databases", ["postgres"], indirect=True)
async def test_ten_minutes_without_a_server_error(stack: Stack) -> None:
    person = await stack.person()
    for name, who in (("a person", person.metadata), ("an operator", stack.operator)):
        said = await break_it(stack.url, who, "--max-time", "300", "--max-examples", "100000", "--continue-on-failure")
        print(f"as {name}, 300 s: {said}")
