"""The audit log: who did what, in the transaction that did it."""

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, String
from sqlalchemy.orm import Mapped, declared_attr, mapped_column

from services.kit import ids
from services.kit.columns import Identifier, Tenant, UtcDateTime, now


class AuditRow(Tenant):
    """Mixin of each service's ``audit_events``. Table key (org_id, id, created_at): partitioned by month on PostgreSQL."""

    org_id: Mapped[str] = mapped_column(Identifier("org"), primary_key=True, sort_order=-20)
    id: Mapped[str] = mapped_column(Identifier("aud"), primary_key=True, default=lambda: ids.new("aud"), sort_order=-19)
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, primary_key=True, default=now, sort_order=-18)
    subject: Mapped[str] = mapped_column(String(100))
    """Who: "usr_...", "service:gateway", "operator"."""
    method: Mapped[str] = mapped_column(String(200))
    """What: the full name of the RPC."""
    resource_id: Mapped[str] = mapped_column(String(100), default="", index=True)
    project_id: Mapped[str | None] = mapped_column(Identifier("prj"))
    request_id: Mapped[str] = mapped_column(String(100), default="")
    before: Mapped[dict[str, Any] | None] = mapped_column(JSON)
    after: Mapped[dict[str, Any] | None] = mapped_column(JSON)

    @declared_attr.directive
    def __mapper_args__(cls) -> dict[str, Any]:
        return {"primary_key": [cls.id]}
