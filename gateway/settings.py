"""Settings of the gateway."""

import ipaddress
import re

from pydantic import Field, SecretStr, field_validator, model_validator

from gateway.models.upstreams import Upstream, simulated
from gateway.webhooks.clerk import key_of
from services.kit.settings import KitSettings

_ORIGIN = re.compile(r"https?://[a-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:]+\](:[0-9]{1,5})?")
MIN_SECRET_CHARS = 16


class GatewaySettings(KitSettings):
    """Read from the environment as ``CLAWPLANE_<NAME>``."""

    user_target: str = Field("127.0.0.1:50051", description="host:port of the user service (gRPC)")
    deployment_target: str = Field("127.0.0.1:50052", description="host:port of the deployment service (gRPC)")
    http_host: str = Field("127.0.0.1", description="address on which the gateway listens")
    http_port: int = Field(8080, ge=1, le=65535, description="port on which the gateway listens")
    trusted_proxies: list[str] = Field(
        default_factory=list, description="addresses or networks whose X-Forwarded-For and -Proto count, 10.0.0.0/8; empty: none"
    )
    public_url: str = Field("http://127.0.0.1:8080", description="address of the gateway as browsers see it")

    stripe_webhook_secrets: list[SecretStr] = Field(
        default_factory=list, description="signing secrets of Stripe; several while rolling"
    )
    clerk_webhook_secrets: list[SecretStr] = Field(
        default_factory=list, description="signing secrets of Clerk's webhooks, whsec_...; several while rolling"
    )
    polar_webhook_secrets: list[SecretStr] = Field(
        default_factory=list, description="signing secrets of Polar's webhooks; several while rolling"
    )
    polar_sandbox: bool = Field(True, description="whether the webhooks come from Polar's sandbox, where no money moves")
    sandbox_enabled: bool = Field(False, description="checkout without money")
    sandbox_allow_remote: bool = Field(False, description="lets the sandbox listen on an address that is not a loopback one")
    sandbox_webhook_secret: SecretStr = Field(SecretStr(""), description="signs the sandbox's own webhooks")
    mailbox_enabled: bool = Field(
        False, description="shows all mail on a page instead of sending it: whoever reaches the page can sign in as anybody"
    )
    sign_in_links: bool = Field(False, description="one-time links are made by `clawplane sign-in`; the sign-in page says so")
    webhook_tolerance_s: int = Field(300, ge=1, description="how far a signature's time may be from ours, either way")

    model_upstreams: list[Upstream] = Field(
        default_factory=list,
        description="providers of models, as JSON: provider, prefixes, base_url, api_key; empty: none, in the sandbox simulated ones",
    )
    model_upstream_timeout_s: float = Field(120, gt=0, description="longest silence of a model's provider")

    cors_origins: list[str] = Field(
        default_factory=list, description="origins whose pages may call this gateway, https://app.example.com; empty: none"
    )
    call_timeout_s: float = Field(30, gt=0, description="deadline of a forwarded call")
    webhook_timeout_s: float = Field(10, gt=0, description="deadline of the call that applies a webhook")
    max_body_bytes: int = Field(1024 * 1024, ge=1, description="largest request body")
    webhook_max_bytes: int = Field(512 * 1024, ge=1, description="largest webhook body")

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: list[str]) -> list[str]:
        for origin in origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError("each is scheme, host and port alone, as a browser sends it: https://app.example.com")
        return origins

    @model_validator(mode="after")
    def _check_secrets(self) -> "GatewaySettings":
        stripe = [secret.get_secret_value() for secret in self.stripe_webhook_secrets]
        sandbox = self.sandbox_webhook_secret.get_secret_value()
        # An empty secret would make signatures that anybody can compute.
        if any(len(secret) < MIN_SECRET_CHARS for secret in stripe):
            raise ValueError(f"CLAWPLANE_STRIPE_WEBHOOK_SECRETS: each needs {MIN_SECRET_CHARS} characters or more")
        if any(len(secret.get_secret_value()) < MIN_SECRET_CHARS for secret in self.polar_webhook_secrets):
            raise ValueError(f"CLAWPLANE_POLAR_WEBHOOK_SECRETS: each needs {MIN_SECRET_CHARS} characters or more")
        for secret in self.clerk_webhook_secrets:
            try:
                good = len(key_of(secret.get_secret_value())) >= MIN_SECRET_CHARS
            except ValueError:
                good = False
            if not good:
                raise ValueError("CLAWPLANE_CLERK_WEBHOOK_SECRETS: each is whsec_ and base64 of a key")
        if self.mailbox_enabled and not is_loopback(self.http_host):
            raise ValueError("CLAWPLANE_MAILBOX_ENABLED: the mailbox page is for development, and on loopback addresses only")
        if not self.sandbox_enabled:
            return self
        if len(sandbox) < MIN_SECRET_CHARS:
            raise ValueError(
                f"CLAWPLANE_SANDBOX_WEBHOOK_SECRET needs {MIN_SECRET_CHARS} characters or more while the sandbox is enabled"
            )
        if sandbox in stripe:
            raise ValueError("CLAWPLANE_SANDBOX_WEBHOOK_SECRET must not be one of Stripe's")
        if not is_loopback(self.http_host) and not self.sandbox_allow_remote:
            raise ValueError("the sandbox listens on loopback addresses only; CLAWPLANE_SANDBOX_ALLOW_REMOTE=true overrides this")
        return self

    def upstreams(self) -> list[Upstream]:
        """The providers of models."""
        return self.model_upstreams or (simulated(self.own_base_url()) if self.sandbox_enabled else [])

    def own_base_url(self) -> str:
        """Where this process reaches itself: ``http://host:port``."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.http_host, self.http_host)  # noqa: S104
        return f"http://[{host}]:{self.http_port}" if ":" in host else f"http://{host}:{self.http_port}"


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine can connect to `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
