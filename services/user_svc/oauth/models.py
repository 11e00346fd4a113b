"""Table of the sign-ins under way at a provider."""

from datetime import datetime

from sqlalchemy import LargeBinary, String
from sqlalchemy.orm import Mapped, mapped_column

from services.kit.columns import Timestamps, UtcDateTime, identifier
from services.user_svc.base import Base


class OAuthState(Timestamps, Base):
    """One of them: only hashes of the state and of what the browser has. Verifier and nonce follow from the id and the server's key."""

    __tablename__ = "oauth_states"

    id: Mapped[str] = identifier("oas")
    provider: Mapped[str] = mapped_column(String(32))
    digest: Mapped[bytes] = mapped_column(LargeBinary(32), unique=True)
    browser: Mapped[bytes] = mapped_column(LargeBinary(32))
    redirect_path: Mapped[str] = mapped_column(String(2048))
    used_at: Mapped[datetime | None] = mapped_column(UtcDateTime)
    expires_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)
