"""Settings that every process has; each process adds its own in its ``settings.py``."""

import base64
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.kit import rates

_HEX = re.compile(r"[0-9a-fA-F]{64}")
Rate = Annotated[str, AfterValidator(rates.checked)]
"""A number and a period: "6000/minute"."""


class KitSettings(BaseSettings):
    """Read from the environment as ``CLAWPLANE_<NAME>``; nested values as JSON."""

    # Compose files pass on what is not set as an empty text.
    model_config = SettingsConfigDict(env_prefix="CLAWPLANE_", extra="ignore", frozen=True, env_ignore_empty=True)

    environment: Literal["development", "production"] = Field("development", description="production refuses conveniences")
    data_dir: Path = Field(Path(".clawplane"), description="where the embedded default keeps its files")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")

    # Credentials. Keys are 32 bytes as base64 or 64 hexadecimal digits; the embedded default makes its own (see kit/devkeys.py).
    service_name: str = Field("clawplane", description="issuer and subject of the tokens that this process signs")
    service_private_key: SecretStr = Field(SecretStr(""), description="Ed25519 seed with which this process signs")
    service_public_keys: dict[str, str] = Field(default_factory=dict, description="issuer -> Ed25519 public key that is trusted")
    operator_token: SecretStr = Field(SecretStr(""), description="token of operators; empty: there are none")
    clerk_issuer: str = Field("", description="issuer of Clerk's session tokens, https://...; empty: they are not accepted")
    clerk_jwks_url: str = Field("", description="where Clerk's keys are; empty: /.well-known/jwks.json of the issuer")
    clerk_jwt_key: str = Field("", description="Clerk's public key as PEM, instead of fetching it")
    clerk_authorized_parties: list[str] = Field(default_factory=list, description="origins whose session tokens count (azp); empty: all")
    key_ring: Path | None = Field(None, description="file of the key ring, which `clawplane keys rotate` changes; made of the keys below")
    encryption_key: SecretStr = Field(SecretStr(""), description="AES-256 key for secrets at rest: a ring of one")
    encryption_keys: dict[str, SecretStr] = Field(default_factory=dict, description="key id -> AES-256 key of the ring, oldest first")
    encryption_key_id: str = Field("", description="the key id that new secrets use")
    hmac_key: SecretStr = Field(SecretStr(""), description="key of the hashes of keys")
    hmac_key_id: str = Field("", pattern="^[A-Za-z0-9_-]{0,50}$", description="id of hmac_key; the first one needs none")
    hmac_keys: dict[str, SecretStr] = Field(default_factory=dict, description="id -> earlier HMAC key, under which hashes are still stored")
    audit_key: SecretStr = Field(SecretStr(""), description="key of the audit log's seals; keep it where the databases' backups are not")

    audit_seal_s: float = Field(1, gt=0, description="how often new rows of the audit log are sealed")

    # Database pool, in SQLAlchemy's words.
    pool_size: int = Field(5, ge=1, description="connections kept open")
    max_overflow: int = Field(15, ge=0, description="connections above pool_size, closed after use")
    pool_timeout_s: float = Field(30, gt=0, description="wait for a free connection")
    connect_tries: int = Field(3, ge=1, description="tries to connect at start")
    statement_timeout_s: float = Field(30, gt=0, description="a statement is stopped after this (PostgreSQL)")
    lock_timeout_s: float = Field(5, gt=0, description="a wait for a lock is given up after this")
    slow_statement_ms: int = Field(200, ge=0, description="statements that take longer are logged by name")

    # Calls.
    transport: Literal["grpcio", "native"] = Field("grpcio", description="what speaks HTTP/2; native needs the extra of that name")
    max_concurrent_calls: int = Field(500, ge=1, description="unary calls handled at once; more are refused at once")
    max_message_bytes: int = Field(4 * 1024 * 1024, ge=1024, description="largest message that is read")
    rate_limit: Rate = Field("6000/minute", description="calls of one subject; services and operators have none")
    public_rate_limit: Rate = Field("600/minute", description="calls without a credential from one network: an address, or an IPv6 /64")
    failed_rate_limit: Rate = Field("60/minute", description="credentials that do not hold from one network; then only known ones are read")
    method_rates_factor: float = Field(1, gt=0, le=1e6, description="the rates of single methods, times this; above 1 for tests of load")
    redis_url: SecretStr = Field(SecretStr(""), description="redis://... where all processes count rates together; empty: each for itself")
    redis_timeout_s: float = Field(0.1, gt=0, description="how long a count may take; then the call is let in uncounted")
    metrics_port: int = Field(0, ge=0, le=65535, description="port of Prometheus metrics of a service alone; 0: none")
    drain_timeout_s: float = Field(5, gt=0, description="time that calls in flight get to finish when the process stops")

    @property
    def key_environment(self) -> str:
        """The environment written into keys."""
        return "live" if self.environment == "production" else "test"

    def seed(self) -> bytes:
        """The Ed25519 seed of this process, 32 bytes."""
        return decode_key(self.service_private_key, "service_private_key")


def decode_key(value: SecretStr | str, name: str) -> bytes:
    """Base64 text, or 64 hexadecimal digits, to the 32 bytes of a key; ValueError names the setting, never its value."""
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if _HEX.fullmatch(text):
        return bytes.fromhex(text)
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise ValueError(f"CLAWPLANE_{name.upper()} must be base64 of 32 bytes, or 64 hexadecimal digits")
    return raw
