"""Answers that are given again without asking the handler."""

from collections.abc import Callable
from typing import Any

import grpc
import pytest

from services.kit import standing
from services.kit.standing import Standing, Word
from tests.kit.echo import Answer, Echo, Request, refused

Code = grpc.StatusCode


class _Said(Word):
    def __init__(self, holds: Callable[[], bool]) -> None:
        self._holds = holds

    def holds(self) -> bool:
        return self._holds()


class Scale:
    """Answers with what it is asked, and how often it was asked so far; its word holds as long as ``holds`` says."""

    def __init__(self) -> None:
        self.asked = self.words = 0
        self.holds = True

    async def __call__(self, request: Any, call: Any) -> Any:
        self.asked += 1
        call.stands_by(_Said(self._word))
        return Answer(text=f"{request.text} {self.asked}")

    def _word(self) -> bool:
        self.words += 1
        return self.holds


async def test_an_answer_stands_as_long_as_the_word_for_it_holds(echo: Echo) -> None:
    scale = echo.service.on["Weigh"] = Scale()
    assert [(await echo.call("Weigh", "a", echo.operator)).text for _ in range(3)] == ["a 1"] * 3
    assert (await echo.call("Weigh", "b", echo.operator)).text == "b 2"
    assert scale.words == 2
    scale.holds = False
    assert [(await echo.call("Weigh", "a", echo.operator)).text for _ in range(2)] == ["a 3", "a 4"]
    scale.holds = True
    assert [(await echo.call("Weigh", "a", echo.operator)).text for _ in range(3)] == ["a 4"] * 3


async def test_what_stands_is_for_those_alone_who_may_ask(echo: Echo) -> None:
    scale = echo.service.on["Weigh"] = Scale()
    await echo.call("Weigh", "a", echo.operator)
    assert (await refused(echo.call("Weigh", "a"))).code() is Code.PERMISSION_DENIED
    assert (await refused(echo.call("Weigh", "a", ()))).code() is Code.UNAUTHENTICATED
    assert (scale.asked, scale.words) == (1, 0)


async def test_what_fails_does_not_stand(echo: Echo) -> None:
    async def fails(request: Any, call: Any) -> Any:
        call.stands_by(_Said(lambda: True))
        raise NotImplementedError

    echo.service.on["Weigh"] = fails
    assert (await refused(echo.call("Weigh", "a", echo.operator))).code() is Code.INTERNAL
    echo.service.on["Weigh"] = Scale()
    assert (await echo.call("Weigh", "a", echo.operator)).text == "a 1"


@pytest.mark.parametrize("name", ["Read", "Show", "Write", "Manage", "Open"])
async def test_only_unaudited_reads_of_the_platform_may_stand(echo: Echo, name: str) -> None:
    """What others get depends on who they are."""
    scale = echo.service.on[name] = Scale()
    for _ in range(2):
        assert (await refused(echo.call(name, "a", echo.operator if name == "Manage" else None))).code() is Code.INTERNAL
    assert (scale.asked, scale.words) == (2, 0)


def test_so_many_stand_and_no_text_of_them_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standing, "_MOST", 3)
    answers = Standing()
    asked = [Request(text=f"secret {number}").SerializeToString() for number in range(4)]
    for raw in asked:
        answers.keep(raw, b"answer", _Said(lambda: True))
    assert [answers.again(raw) for raw in asked] == [None, None, None, b"answer"]
    assert not any(b"secret" in name for name in answers._kept)
