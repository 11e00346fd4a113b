"""Akash's SDL for one bot: built as data, written by a YAML library, so that no value can end or bend the document."""

import secrets as random
from decimal import Decimal

import yaml
from pydantic import BaseModel, Field, field_validator

from services.deployment_svc.markets.driver import Secrets, Spec

_CHANNELS = {"telegram": "TELEGRAM", "discord": "DISCORD", "whatsapp": "WHATSAPP"}


class BotTemplate(BaseModel):
    """What every bot on Akash is made of."""

    image: str = Field(description="container image with a fixed tag or digest")
    port: int = Field(18789, ge=1, le=65535, description="port on which the bot listens in its container")
    public_port: int = Field(80, ge=1, le=65535, description="port on which it is reached")
    cpu: Decimal = Field(Decimal("1.5"), gt=0, description="cores")
    memory: str = Field("3Gi", pattern="^[0-9]+(Mi|Gi)$")
    storage: str = Field("2Gi", pattern="^[0-9]+(Mi|Gi)$", description="scratch space")
    data_storage: str = Field("10Gi", pattern="^[0-9]+(Mi|Gi)$", description="space that outlives a restart")
    data_class: str = Field("beta3", description="storage class of the latter")
    home: str = Field("/home/node", description="home folder in the container; the data is mounted below it")
    context_window: int = Field(200_000, ge=1)
    max_tokens: int = Field(8192, ge=1)
    price_denom: str = Field(
        "ibc/170C677610AC31DF0904FFE09CD3B5C657492170E7E52372E48756B71E56F2F1", description="currency of the offers; the default is USDC"
    )
    max_price: Decimal = Field(Decimal(1000), gt=0, description="most that is paid for a block, in millionths of the currency")
    env: dict[str, str] = Field(default_factory=dict, description="more environment variables, never a key of the platform's own")

    @field_validator("image")
    @classmethod
    def _check_image(cls, image: str) -> str:
        name, _, tag = image.rpartition(":")
        if "@sha256:" not in image and (not name or "/" in tag or tag == "latest"):
            raise ValueError('needs a fixed tag or digest, as "registry/bot:1.2.3": what runs must not change by itself')
        return image


def document(template: BotTemplate, spec: Spec, secrets: Secrets, model_url: str) -> str:
    """The SDL as YAML text. It holds the bot's own secrets, and none of the platform's."""
    profile = {
        "resources": {
            "cpu": {"units": _number(template.cpu)},
            "memory": {"size": template.memory},
            "storage": [
                {"size": template.storage},
                {"name": "data", "size": template.data_storage, "attributes": {"persistent": True, "class": template.data_class}},
            ],
        }
    }
    service = {
        "image": template.image,
        "expose": [{"port": template.port, "as": template.public_port, "to": [{"global": True}]}],
        "env": [f"{name}={value}" for name, value in _environment(template, spec, secrets, model_url).items()],
        "params": {"storage": {"data": {"mount": f"{template.home}/data", "readOnly": False}}},
    }
    pricing = {"bot": {"denom": template.price_denom, "amount": _number(template.max_price)}}
    return yaml.safe_dump(
        {
            "version": "2.0",
            "services": {"bot": service},
            # The placement carries our name as well, so that the order can be told by it on the chain.
            "profiles": {"compute": {"bot": profile}, "placement": {spec.name: {"pricing": pricing}}},
            "deployment": {"bot": {spec.name: {"profile": "bot", "count": 1}}},
        },
        sort_keys=False,
    )


def _environment(template: BotTemplate, spec: Spec, secrets: Secrets, model_url: str) -> dict[str, str]:
    env = {
        "HOME": template.home,
        "TERM": "xterm-256color",
        "MODEL_ID": spec.model,
        "BASE_URL": model_url,
        "API_KEY": secrets.claw_key,
        "API_PROTOCOL": "openai-completions",
        "CONTEXT_WINDOW": str(template.context_window),
        "MAX_TOKENS": str(template.max_tokens),
        "WORKSPACE": f"{template.home}/data/workspace",
        # One of its own for each start, since nobody but the bot needs it.
        "OPENCLAW_GATEWAY_TOKEN": random.token_urlsafe(24),
        "OPENCLAW_GATEWAY_BIND": "lan",
        "OPENCLAW_GATEWAY_PORT": str(template.port),
        "CLAWPLANE_DEPLOYMENT_ID": spec.deployment_id,
        "CLAWPLANE_CHANNEL": spec.channel,
    }
    prefix = _CHANNELS.get(spec.channel)
    if prefix:
        env |= {
            f"{prefix}_ENABLED": "true",
            f"{prefix}_BOT_TOKEN": secrets.channel_token,
            f"{prefix}_DM_POLICY": "open",
            f"{prefix}_ALLOW_FROM": "*",
        }
        if secrets.channel_api_key:
            env[f"{prefix}_API_KEY"] = secrets.channel_api_key
    return template.env | env


def _number(value: Decimal) -> int | float:
    """SDL knows plain numbers; these come from settings and are no money that is ever added up."""
    return int(value) if value == value.to_integral_value() else float(value)
