"""Settings of the deployment service."""

from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field, SecretStr, model_validator

from services.deployment_svc.markets.sdl import BotTemplate
from services.kit.settings import KitSettings

_AKASH = {"bid_window_s": 15.0, "bid_timeout_s": 180.0, "ready_timeout_s": 900.0, "watch_s": 60.0, "step_timeout_s": 120.0, "lease_s": 60.0}

class DeploymentSettings(KitSettings):
    """Read from the environment as ``CLAWPLANE_<NAME>``."""

    deployment_database_url: str = Field("", description="database; empty: a SQLite file in the data directory")
    user_target: str = Field("127.0.0.1:50051", description="host:port of the user service")
    public_url: str = Field("http://127.0.0.1:8080", description="where people reach the gateway")
    bind_host: str = Field("127.0.0.1", description="address that this process listens on")
    models: list[str] = Field(
        ["claude-opus-4.5", "gpt-3.2", "gemini-3-flash", "minimax-m2.5"], description="models that a bot may be ordered with"
    )

    # Payment.
    payment_provider: Literal["sandbox", "stripe", "polar"] = Field("sandbox", description="where new payment pages are made")
    sandbox_enabled: bool = Field(True, description="whether the sandbox's checkout is served")
    sandbox_allow_remote: bool = Field(False, description="serve the sandbox on an address that is not loopback")
    stripe_api_key: SecretStr = Field(SecretStr(""), description="secret key, sk_test_... or sk_live_...")
    stripe_api_base: str = Field("https://api.stripe.com", description="base URL of Stripe's API")
    polar_access_token: SecretStr = Field(SecretStr(""), description="Polar's access token; live when polar_sandbox is false")
    polar_sandbox: bool = Field(True, description="whether the Polar token is of Polar's sandbox")
    polar_product_id: str = Field("", description="the product at Polar that pages sell; its own price does not count")
    polar_api_base: str = Field("", description="base URL of Polar's API; empty: the one of polar_sandbox")
    checkout_timeout_s: float = Field(10, gt=0, description="longest wait for one answer of a payment provider")
    checkout_ttl_s: int = Field(24 * 3600, ge=1800, le=24 * 3600, description="how long a payment page stays open")
    checkout_min_left_s: int = Field(120, ge=0, description="a page with less time left is replaced")
    payment_check_s: float = Field(300, gt=0, description="the provider is asked about pages older than this, and this often")
    refund_check_s: float = Field(
        24 * 3600, gt=0, description="the provider is asked this often about the payments of live deployments"
    )

    # Provisioning.
    driver: str = Field("local", description='"local", "akash", or "package.module:factory" of a driver of your own')
    driver_options: dict[str, str] = Field(default_factory=dict, description="keyword arguments of such a factory")
    local_providers: dict[str, Decimal] = Field(
        {"local-a": Decimal("0.010"), "local-b": Decimal("0.012"), "local-c": Decimal("0.015")},
        description="the local driver's providers and their prices an hour",
    )
    akash_api_key: SecretStr = Field(SecretStr(""), description="key of Akash's Console API, ac.sk....")
    akash_api_base: str = Field("https://console-api.akash.network", description="base URL of the Console API")
    akash_bot: BotTemplate | None = Field(
        None, description='what a bot is made of, as JSON; "image" is needed: {"image": "registry/bot:1.2.3"}'
    )
    akash_block_s: Decimal = Field(Decimal("6.1"), gt=0, description="how long a block of Akash takes; offers are prices a block")
    akash_deposit_usd: Decimal = Field(Decimal(0), ge=0, description="deposit of an order; 0: the Console funds it from the account")
    akash_health_path: str = Field("/", description="what is asked of a bot on Akash to see that it answers")
    model_url: str = Field("", description="where bots ask their models; empty: /v1 of public_url")
    poll_s: float = Field(1, gt=0, description="how often due work is looked for")
    lease_s: float = Field(15, gt=0, description="work of a dead process is taken over after this")
    concurrency: int = Field(16, ge=1, description="deployments that one process works on at once")
    org_deploying: int = Field(5, ge=1, description="orders that are brought up for one organization at once; others wait their turn")
    all_deploying: int = Field(200, ge=1, description="orders that are brought up at once in all")
    stuck_after_s: float = Field(24 * 3600, gt=0, description="what is not brought up within this FAILS, whoever is at fault")
    reap_s: float = Field(60, gt=0, description="how often deployments that nothing moves any more are looked for")
    sweep_s: float = Field(600, gt=0, description="how often the market is searched for orders of ours that came to be late")
    bid_window_s: float = Field(0, ge=0, description="offers are collected this long before one is chosen")
    bid_timeout_s: float = Field(60, gt=0, description="an order without a usable offer is given up after this")
    ready_timeout_s: float = Field(120, gt=0, description="a bot that does not answer is given up after this")
    watch_poll_s: float = Field(0.25, gt=0, description="how often a watch looks for new events")
    watch_s: float = Field(5, gt=0, description="how often a running bot is looked at")
    step_timeout_s: float = Field(30, gt=0, description="longest wait for one answer of the market")
    backoff_s: float = Field(2, gt=0, description="pause after a failed attempt; doubles up to backoff_max_s")
    backoff_max_s: float = Field(120, gt=0)
    fail_after_attempts: int = Field(3, ge=1, description="attempts before a deployment may fail")
    fail_after_s: float = Field(15 * 60, ge=0, description="time over which attempts are made before a deployment may fail")

    silent_timeout_s: float = Field(600, gt=0, description="a running bot that does not answer this long is lost")

    # The blacklist's own rule.
    blacklist_failures: int = Field(3, ge=1, description="failures of a provider within blacklist_window_s that exclude it")
    blacklist_deployments: int = Field(2, ge=1, description="how many deployments they must be of")
    blacklist_window_s: float = Field(3600, gt=0, description="time over which failures are counted")
    blacklist_first_s: float = Field(3600, gt=0, description="first exclusion; each further one doubles")
    blacklist_max_s: float = Field(7 * 24 * 3600, gt=0, description="longest exclusion by the rule")
    blacklist_share: Fraction = Field(Fraction(1, 3), ge=0, le=1, description="most of the bidders that may be excluded, as 1/3 or 0.25")
    unproven_in_flight: int = Field(3, ge=1, description="bots that a provider may bring up at once before one has ever come up")
    score_window_s: float = Field(7 * 24 * 3600, gt=0, description="outcomes that count when a provider is chosen")
    outcome_kept_s: float = Field(30 * 24 * 3600, gt=0, description="how long outcomes are kept")

    # The model endpoint.
    model_max_tokens: int = Field(8192, ge=1, description="most tokens of one answer; held for a call that names no number of its own")
    model_call_s: float = Field(300, gt=0, description="a call that is neither renewed nor settled by then is settled by estimate")

    # Usage.
    usage_late_days: int = Field(35, ge=1, description="how late an event may be reported")
    usage_ahead_s: int = Field(300, ge=0, description="how far ahead of time an event may be")
    usage_retention_days: int = Field(400, ge=1, description="how long events are kept; their sums stay")
    usage_waiting: int = Field(50_000, ge=1, description="events that may wait in one process to be written; more are sent again later")
    usage_batched: bool = Field(True, description="whether single events share commits; false only to see what that saves")
    limits_s: float = Field(1, gt=0, description="how often limits that fill up and spend caps are looked at")
    usage_currency: str = Field("usd", pattern="^[a-z]{3}$", description="currency of the ledger and its prices, ISO 4217")
    prices_file: str = Field("", description="YAML price file that an empty price book is filled from; empty: the bundled one")

    @property
    def database_url(self) -> str:
        """The database of this service."""
        return self.deployment_database_url or f"sqlite+aiosqlite:///{self.data_dir / 'deployment_svc.db'}"

    @model_validator(mode="before")
    @classmethod
    def _akash_takes_its_time(cls, given: dict[str, Any]) -> dict[str, Any]:
        """A network of strangers is slower than processes on this machine: other defaults, for what was not set."""
        return _AKASH | given if given.get("driver") == "akash" else given

    @model_validator(mode="after")
    def _usage_outlives_its_window(self) -> "DeploymentSettings":
        # An event that is dropped may not come again as new: its month is whole until nobody may report for it any more.
        if self.usage_retention_days < self.usage_late_days + 31:
            raise ValueError("CLAWPLANE_USAGE_RETENTION_DAYS must be at least 31 more than CLAWPLANE_USAGE_LATE_DAYS")
        return self

    @model_validator(mode="after")
    def _akash_is_complete(self) -> "DeploymentSettings":
        if self.driver == "akash" and not (self.akash_api_key.get_secret_value() and self.akash_bot):
            raise ValueError("CLAWPLANE_AKASH_API_KEY and CLAWPLANE_AKASH_BOT are needed when CLAWPLANE_DRIVER is akash")
        return self

    @model_validator(mode="after")
    def _sandbox_is_safe(self) -> "DeploymentSettings":
        if not self.sandbox_enabled:
            if self.payment_provider == "sandbox":
                raise ValueError("CLAWPLANE_PAYMENT_PROVIDER is sandbox, which CLAWPLANE_SANDBOX_ENABLED turns off")
            return self
        if "_live_" in self.stripe_api_key.get_secret_value():
            raise ValueError("the sandbox must not be enabled beside a live Stripe key: set CLAWPLANE_SANDBOX_ENABLED=false")
        if self.polar_access_token.get_secret_value() and not self.polar_sandbox:
            raise ValueError("the sandbox must not be enabled beside a live Polar token: set CLAWPLANE_SANDBOX_ENABLED=false")
        if self.bind_host not in {"127.0.0.1", "::1", "localhost"} and not self.sandbox_allow_remote:
            raise ValueError(
                "the sandbox lets anyone who reaches it pay without money: bind to loopback, "
                "or set CLAWPLANE_SANDBOX_ALLOW_REMOTE=true if that is what you want"
            )
        return self
