"""Settings of the user service."""

from pydantic import BaseModel, Field, model_validator

from services.kit.settings import KitSettings


class Tier(BaseModel):
    """What a tier costs and allows. 0 means without limit."""

    price_minor: int = Field(ge=0, description="price of one deployment, in minor units")
    currency: str = Field("usd", pattern="^[a-z]{3}$")
    monthly_tokens: int = Field(ge=0)
    monthly_credit_minor: int = Field(ge=0)
    live_deployments: int = Field(ge=0)


TIERS = {
    "starter": Tier(price_minor=2900, monthly_tokens=1_000_000, monthly_credit_minor=1000, live_deployments=1),
    "pro": Tier(price_minor=4900, monthly_tokens=2_000_000, monthly_credit_minor=2000, live_deployments=3),
    "business": Tier(price_minor=9900, monthly_tokens=6_000_000, monthly_credit_minor=6000, live_deployments=0),
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
