"""Asking a provider: what never reached one costs nobody anything."""

import socket

import aiohttp
import orjson
import pytest

from gateway.models.ask import Asker, Unanswered
from gateway.models.openai import outgoing, parse
from gateway.models.upstreams import Upstream

WISH = parse(orjson.dumps({"model": "gpt-5", "messages": [{"role": "user", "content": "hello"}]}))


async def test_a_provider_that_takes_no_connection_has_answered_nothing() -> None:
    """As behind a firewall that drops what comes: nobody refuses, and nobody takes the connection."""
    asker = Asker(5)
    asker._timeout = aiohttp.ClientTimeout(connect=0.3)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(8)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        upstream = Upstream(provider="openai", prefixes=["gpt"], base_url=f"http://127.0.0.1:{full.getsockname()[1]}/v1")
        try:
            with pytest.raises(Unanswered) as refused:
                await asker.ask(upstream, WISH, 100)
        finally:
            for one in waiting:
                one.close()
            await asker.close()
    assert refused.value.error.status == 503 and refused.value.error.headers == {"Retry-After": "1"}


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_an_answer_is_bounded_by_the_parameter_that_its_provider_takes(name: str) -> None:
    sent = orjson.loads(outgoing(WISH, "gpt-5", 100, name))
    assert {key: value for key, value in sent.items() if key.startswith("max_")} == {name: 100}
    mine = parse(orjson.dumps({"model": "gpt-5", "messages": [{}], "max_completion_tokens": 7}))
    assert "max_tokens" not in orjson.loads(outgoing(mine, "gpt-5", 100, name))
