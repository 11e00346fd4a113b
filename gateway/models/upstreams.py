"""The providers that models are asked at."""

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field, SecretStr, field_validator


class Upstream(BaseModel):
    """A provider with an API of OpenAI's shape. The first whose prefix a model starts with is asked."""

    provider: str = Field(pattern="^[a-z0-9][a-z0-9._-]{0,63}$", description="name in the ledger and the price book")
    prefixes: list[str] = Field(min_length=1, description="models that start so are asked here")
    base_url: str = Field(description="address before /chat/completions, https://api.example.com/v1")
    api_key: SecretStr = Field(SecretStr(""), description="the platform's key there; it never leaves the gateway")
    limit_name: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="parameter that bounds an answer; OpenAI's own models of today take max_completion_tokens alone"
    )
    names: dict[str, str] = Field(default_factory=dict, description="our name of a model -> the provider's, where they differ")

    @field_validator("base_url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        if not url.startswith(("https://", "http://")):
            raise ValueError("must begin with https:// or http://")
        return url.rstrip("/")

    def name_of(self, model: str) -> str:
        """The provider's own name of a model."""
        return self.names.get(model, model)


def find(upstreams: Sequence[Upstream], model: str) -> Upstream | None:
    """The provider of a model."""
    return next((one for one in upstreams if model.startswith(tuple(one.prefixes))), None)


SIMULATED_KEY = "simulated"
_SIMULATED = {"anthropic": "claude", "openai": "gpt", "google": "gemini", "minimax": "minimax"}


def simulated(base_url: str) -> list[Upstream]:
    """The sandbox's: every provider answered by this process itself, so that a bot chats on a laptop with no account."""
    return [
        Upstream(provider=provider, prefixes=[prefix], base_url=f"{base_url}/sandbox/models/v1", api_key=SecretStr(SIMULATED_KEY))
        for provider, prefix in _SIMULATED.items()
    ]
