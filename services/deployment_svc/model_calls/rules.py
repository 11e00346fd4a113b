"""Whether a call fits into the credit, and what it becomes in the ledger: pure functions."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

from clawplane.deployment.v1 import usage_event_pb2
from clawplane.deployment.v1.model_call_service_pb2 import ModelCallUsage
from clawplane.errors.v1.errors_pb2 import ErrorReason
from services.deployment_svc.usage.prices import PriceBook
from services.deployment_svc.usage.rules import to_row
from services.kit.auth import Caller
from services.kit.errors import Exhausted

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Credit:
    """A month's credit; ``granted`` None means without limit."""

    granted: Decimal | None
    spent: Decimal
    held: Decimal
    currency: str

    def refusal(self, needed: Decimal) -> Exhausted | None:
        """Why a call that may cost so much cannot be made now, or None."""
        if self.granted is None or self.spent + self.held + needed <= self.granted:
            return None
        money = {"credit": self.granted, "spent": self.spent, "held": self.held, "needed": needed}
        said: dict[str, Any] = {name: f"{value.normalize():f}" for name, value in money.items()}
        return Exhausted(
            f"the month's credit of {said['credit']} {self.currency.upper()} does not cover this call: {said['spent']} are spent, "
            f"{said['held']} are held by calls under way, and this one may cost {said['needed']}",
            reason=ErrorReason.ERROR_REASON_CREDIT_EXHAUSTED, currency=self.currency, **said,
        )  # fmt: skip


def abandoned(call: Row) -> ModelCallUsage:
    """What is written for a call that nobody has settled. What it has really used nobody knows, so it is what was held for it."""
    return ModelCallUsage(
        id=call["id"], tokens_in=call["tokens_in_estimate"], tokens_out=call["max_tokens"], estimated=True,
        status=usage_event_pb2.USAGE_STATUS_ERROR,
    )  # fmt: skip


def event_of(call: Row, used: ModelCallUsage, at: datetime, prices: PriceBook) -> dict[str, Any]:
    """The usage event of a call, as columns. It happened when it was opened, so its month does not depend on who settles it."""
    who = Caller(
        "claw", "model endpoint", org_id=call["org_id"], user_id=call["user_id"] or "", deployment_id=call["deployment_id"] or "",
        key_id=call["api_key_id"] or "",
    )  # fmt: skip
    event = usage_event_pb2.UsageEvent(
        id=call["id"], provider=call["provider"], model=call["model"], type=usage_event_pb2.USAGE_TYPE_CHAT,
        tokens_in=used.tokens_in, tokens_out=used.tokens_out, tokens_cached=min(used.tokens_cached, used.tokens_in),
        tokens_reasoning=min(used.tokens_reasoning, used.tokens_out), latency_ms=used.latency_ms, status=used.status,
        estimated=used.estimated,
    )  # fmt: skip
    return to_row(event, who, call["org_id"], call["created_at"], at, prices)
