"""Settings of the user service."""

from email.utils import parseaddr
from typing import Literal

from pydantic import BaseModel, Field, SecretStr, model_validator

from services.kit.settings import KitSettings


class Tier(BaseModel):
    """What a tier costs and allows. 0 means without limit."""

    price_minor: int = Field(ge=0, description="price of one deployment, in minor units")
    currency: str = Field("usd", pattern="^[a-z]{3}$")
    monthly_tokens: int = Field(ge=0)
    monthly_credit_minor: int = Field(ge=0)
    live_deployments: int = Field(ge=0)
    hourly_tokens: int = Field(0, ge=0)


TIERS = {
    "starter": Tier(price_minor=2900, monthly_tokens=1_000_000, monthly_credit_minor=1000, live_deployments=1, hourly_tokens=100_000),
    "pro": Tier(price_minor=4900, monthly_tokens=2_000_000, monthly_credit_minor=2000, live_deployments=3, hourly_tokens=500_000),
    "business": Tier(price_minor=9900, monthly_tokens=6_000_000, monthly_credit_minor=6000, live_deployments=0, hourly_tokens=2_000_000),
}


class UserSettings(KitSettings):
    """Read from the environment as ``CLAWPLANE_<NAME>``."""

    user_database_url: str = Field("", description="database of the user service; empty: a SQLite file in the data directory")
    tiers: dict[str, Tier] = Field(TIERS, description="the tiers, by name")
    polar_tiers: dict[str, str] = Field(default_factory=dict, description="product at Polar -> tier that a subscription to it gives")
    changes_kept_days: int = Field(30, ge=1, description="how long changes are kept for followers that were away")
    sign_in_links: bool = Field(False, description="one-time links for the operator of the embedded default, which alone sets it")
    operator_email: str = Field("operator@clawplane.local", description="address of that operator; nobody can own it")
    default_tier: str = Field("starter", description="tier of a new organization")
    organizations_per_user: int = Field(20, ge=1, description="organizations that one user may own, beside the personal one")
    open_invitations: int = Field(200, ge=1, description="open invitations that one organization may have")

    public_url: str = Field("http://127.0.0.1:8080", description="address of the gateway as browsers see it; mails lead there")

    sign_ins_per_network: int = Field(
        100, ge=1, description="codes asked for, codes tried and passwords tried within 15 minutes, of each, from one network"
    )
    session_idle_s: float = Field(
        # Whoever leaves on Friday and comes back on Monday morning is still signed in; a forgotten browser is not for long.
        3 * 86400, ge=300, le=7 * 86400, description="a session ends when it was not used for so long"
    )  # fmt: skip
    password_memory_kib: int = Field(65536, ge=64, description="memory of one argon2id hash, KiB")
    password_time_cost: int = Field(3, ge=1, description="passes of one argon2id hash")
    password_lanes: int = Field(4, ge=1, description="lanes of one argon2id hash")
    password_workers: int = Field(2, ge=1, description="passwords hashed at once by one process")

    oauth_google_client_id: str = Field("", description="this installation's id at Google; empty: nobody signs in with Google")
    oauth_google_client_secret: SecretStr = Field(SecretStr(""), description="its secret there")
    oauth_google_url: str = Field("https://accounts.google.com", description="issuer of Google's OpenID Connect")
    oauth_microsoft_client_id: str = Field("", description="the same at Microsoft")
    oauth_microsoft_client_secret: SecretStr = Field(SecretStr(""), description="its secret there")
    oauth_microsoft_url: str = Field(
        "https://login.microsoftonline.com/common/v2.0", description="Microsoft's OpenID Connect; a tenant's id instead of common: it alone"
    )
    oauth_github_client_id: str = Field("", description="the same at GitHub")
    oauth_github_client_secret: SecretStr = Field(SecretStr(""), description="its secret there")
    oauth_github_url: str = Field("https://github.com", description="GitHub's pages")
    oauth_github_api_url: str = Field("https://api.github.com", description="GitHub's interface")

    smtp_host: str = Field("", description="mail server; empty: mail goes to the console in development, and nowhere in production")
    smtp_port: int = Field(587, ge=1, le=65535, description="its port; usually 587 with starttls, 465 with tls")
    smtp_username: str = Field("", description="name at the mail server; empty: it asks for none")
    smtp_password: SecretStr = Field(SecretStr(""), description="password at the mail server")
    smtp_security: Literal["starttls", "tls", "none"] = Field("starttls", description="how the connection to it is encrypted")
    mail_from: str = Field("Clawplane <no-reply@clawplane.local>", description="sender of mail")

    @model_validator(mode="after")
    def _providers_are_whole(self) -> "UserSettings":
        for name in ("google", "microsoft", "github"):
            if bool(getattr(self, f"oauth_{name}_client_id")) != bool(getattr(self, f"oauth_{name}_client_secret").get_secret_value()):
                raise ValueError(f"CLAWPLANE_OAUTH_{name.upper()}_CLIENT_ID and _CLIENT_SECRET belong together: set both or none")
        urls = (self.oauth_google_url, self.oauth_microsoft_url, self.oauth_github_url, self.oauth_github_api_url)
        if self.environment == "production" and not all(url.startswith("https://") for url in urls):
            raise ValueError("CLAWPLANE_OAUTH_..._URL must begin with https:// in production")
        return self

    @model_validator(mode="after")
    def _mail_has_a_sender(self) -> "UserSettings":
        if "@" not in parseaddr(self.mail_from)[1]:
            raise ValueError('CLAWPLANE_MAIL_FROM is an address, "name@example.com" or "Name <name@example.com>"')
        if self.smtp_username and self.smtp_security == "none":
            raise ValueError("CLAWPLANE_SMTP_SECURITY=none would send the password of CLAWPLANE_SMTP_USERNAME in clear")
        return self

    @property
    def mail_mode(self) -> Literal["smtp", "console", "off"]:
        """Where mail goes: to the server, to the console with the mailbox page, or nowhere."""
        if self.smtp_host:
            return "smtp"
        return "console" if self.environment == "development" else "off"

    @model_validator(mode="after")
    def _passwords_are_costly(self) -> "UserSettings":
        if self.environment == "production" and (self.password_memory_kib < 19456 or self.password_time_cost < 2):
            raise ValueError("CLAWPLANE_PASSWORD_MEMORY_KIB below 19456 or CLAWPLANE_PASSWORD_TIME_COST below 2 does not protect passwords")
        return self

    @model_validator(mode="after")
    def _tiers_exist(self) -> "UserSettings":
        for name in (self.default_tier, *self.polar_tiers.values()):
            if name not in self.tiers:
                raise ValueError(f"{name} is none of CLAWPLANE_TIERS: {', '.join(self.tiers)}")
        if self.sign_in_links and self.environment == "production":
            raise ValueError("CLAWPLANE_SIGN_IN_LINKS is for the embedded default: in production people sign in otherwise")
        return self

    @property
    def database_url(self) -> str:
        """The database of this service."""
        return self.user_database_url or f"sqlite+aiosqlite:///{self.data_dir / 'user_svc.db'}"
