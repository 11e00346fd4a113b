"""Metering: roll-ups of quarter hours in three kinds, counters, prices, quotas, reservations; what is there is rolled up anew."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"

_LATENCY_MS = (10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240, 20480, 40960, 81920, 163840)
_SUMMED = ("tokens_in", "tokens_out", "tokens_cached", "tokens_reasoning", "tokens_total")
_TOKENS = "tokens_in >= 0 AND tokens_out >= 0 AND tokens_cached >= 0 AND tokens_reasoning >= 0"
_SCOPES = "scope IN ('organization', 'user', 'api_key', 'deployment')"
_PERIODS = "period IN ('hour', 'day', 'month')"
_UNITS = "unit IN ('tokens', 'money')"


def _is_sqlite() -> bool:
    return bool(op.get_bind().dialect.name == "sqlite")


def _exact() -> sa.types.TypeEngine[object]:
    return sa.BigInteger() if _is_sqlite() else sa.Numeric(30, 12)


def _run(statement: str) -> None:
    """As it stands: in its times of day nobody is to see parameters."""
    op.get_bind().exec_driver_sql(statement)


def _times() -> list[sa.Column[object]]:
    return [sa.Column(name, sa.DateTime(timezone=True), nullable=False) for name in ("created_at", "updated_at")]


def _numbers(*names: str) -> list[sa.Column[object]]:
    return [sa.Column(name, sa.BigInteger(), nullable=False) for name in names]


def upgrade() -> None:
    _events()
    _rollups()
    _counters()
    _prices()
    _quotas()
    _reservations()
    _suspensions()


def _suspensions() -> None:
    op.add_column("deployments", sa.Column("suspended_for", sa.String(16), nullable=False, server_default=""))
    op.add_column("deployments", sa.Column("resumed_until", sa.DateTime(timezone=True), nullable=True))
    capped = sa.text("suspended_for = 'quota'")
    op.create_index("ix_deployments__capped", "deployments", ["org_id"], postgresql_where=capped, sqlite_where=capped)


def _events() -> None:
    added: list[sa.Column[object]] = [
        sa.Column("stated_cost", _exact(), nullable=True), sa.Column("price_id", sa.Uuid(), nullable=True),
        sa.Column("adjusts", sa.String(100), nullable=False, server_default=""),
        sa.Column("reason", sa.String(500), nullable=False, server_default=""),
    ]  # fmt: skip
    _alter_events(f"adjusts <> '' OR ({_TOKENS})", add=added)


def _alter_events(tokens: str, add: Sequence[sa.Column[object]] = (), drop: Sequence[str] = ()) -> None:
    """Columns of the events, and the check of their tokens."""
    named = op.f("ck_usage_events__tokens")
    # SQLite changes no check of a table that is there: it is copied.
    with op.batch_alter_table("usage_events", recreate="always" if _is_sqlite() else "never") as table:
        table.drop_constraint(named, type_="check")
        for column in add:
            table.add_column(column)
        for name in drop:
            table.drop_column(name)
        table.create_check_constraint(named, tokens)


def _rollups() -> None:
    op.drop_table("usage_rollups")
    latencies = [f"latency_{number:02}" for number in range(len(_LATENCY_MS) + 1)]
    sums = ["events", "errors", "unpriced_events", *_SUMMED]
    dims = [sa.Column(name, sa.String(128), nullable=False) for name in ("dim_1", "dim_2", "dim_3")]
    op.create_table(
        "usage_rollups",
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("starts_at", sa.DateTime(timezone=True), nullable=False),
        *dims,
        sa.Column("currency", sa.String(3), nullable=False),
        *_numbers(*sums),
        sa.Column("cost", _exact(), nullable=False),
        *_numbers(*latencies),
        *_times(),
        sa.PrimaryKeyConstraint("org_id", "kind", "starts_at", "dim_1", "dim_2", "dim_3", "currency", name=op.f("pk_usage_rollups")),
    )
    quarter, text_of, at = _words()
    buckets = ["latency_ms > 0 AND latency_ms < 10"]
    buckets += [f"latency_ms >= {low} AND latency_ms < {high}" for low, high in pairwise(_LATENCY_MS)]
    buckets += [f"latency_ms >= {_LATENCY_MS[-1]}"]
    counted = ", ".join(f"sum(CASE WHEN {bucket} THEN 1 ELSE 0 END)" for bucket in buckets)
    kinds = {
        "model": ("provider", "model", "type"),
        "caller": (text_of("user_id", "usr"), "coalesce(api_key_id, '')", "''"),
        "workload": (text_of("deployment_id", "dep"), text_of("agent_id", "agnt"), text_of("project_id", "prj")),
    }
    names = f"org_id, kind, starts_at, dim_1, dim_2, dim_3, currency, {', '.join(sums)}, cost, {', '.join(latencies)}, created_at, updated_at"
    for kind, (one, two, three) in kinds.items():
        _run(
            f"INSERT INTO usage_rollups ({names}) "  # noqa: S608 - our own words
            f"SELECT org_id, '{kind}', {quarter}, {one}, {two}, {three}, currency, count(*), "
            "sum(CASE WHEN status = 'error' THEN 1 ELSE 0 END), sum(CASE WHEN cost IS NULL THEN 1 ELSE 0 END), "
            f"{', '.join(f'sum({name})' for name in _SUMMED)}, coalesce(sum(cost), 0), {counted}, {at}, {at} "
            "FROM usage_events GROUP BY 1, 3, 4, 5, 6, 7"
        )


def _words() -> tuple[str, Callable[[str, str], str], str]:
    """What both engines say otherwise: the quarter of an hour of an event, an identifier with its prefix, the present time."""
    if _is_sqlite():
        minute = "printf('%02d', (CAST(strftime('%M', occurred_at) AS INTEGER) / 15) * 15)"
        quarter = f"strftime('%Y-%m-%d %H:', occurred_at) || {minute} || ':00.000000'"
        return quarter, lambda column, prefix: f"coalesce('{prefix}_' || {column}, '')", "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
    quarter = "date_bin('15 minutes', occurred_at, TIMESTAMPTZ '2000-01-01 00:00:00+00')"
    return quarter, lambda column, prefix: f"coalesce('{prefix}_' || replace({column}::text, '-', ''), '')", "now()"


def _counters() -> None:
    op.create_table(
        "usage_counters",
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("scope", sa.String(16), nullable=False),
        sa.Column("subject", sa.String(40), nullable=False),
        sa.Column("period", sa.String(8), nullable=False),
        sa.Column("starts_at", sa.DateTime(timezone=True), nullable=False),
        *_numbers("tokens"),
        sa.Column("cost", _exact(), nullable=False),
        *_times(),
        sa.PrimaryKeyConstraint("org_id", "scope", "subject", "period", "starts_at", name=op.f("pk_usage_counters")),
    )
    op.create_index("ix_usage_counters__period_starts_at_org_id", "usage_counters", ["period", "starts_at", "org_id", "scope", "subject"])
    for period in ("hour", "month"):
        if _is_sqlite():
            form = "%Y-%m-%d %H:00:00.000000" if period == "hour" else "%Y-%m-01 00:00:00.000000"
            start, at = f"strftime('{form}', starts_at)", "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
        else:
            start, at = f"date_trunc('{period}', starts_at, 'UTC')", "now()"
        _run(
            "INSERT INTO usage_counters (org_id, scope, subject, period, starts_at, tokens, cost, created_at, updated_at) "  # noqa: S608
            f"SELECT org_id, 'organization', '', '{period}', {start}, sum(tokens_total), sum(cost), {at}, {at} "
            "FROM usage_rollups WHERE kind = 'model' GROUP BY 1, 5"
        )


def _prices() -> None:
    op.create_table(
        "prices",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("provider", sa.String(64), nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        *_numbers("above_tokens_in"),
        sa.Column("effective_from", sa.DateTime(timezone=True), nullable=False),
        sa.Column("effective_to", sa.DateTime(timezone=True), nullable=True),
        sa.Column("currency", sa.String(3), nullable=False),
        *[sa.Column(name, _exact(), nullable=False) for name in ("tokens_in", "tokens_out", "tokens_cached", "tokens_reasoning", "markup")],
        *_times(),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_prices")),
        sa.UniqueConstraint(
            "provider", "model", "above_tokens_in", "effective_from", name=op.f("uq_prices__provider_model_above_tokens_in_effective_from")
        ),
    )
    op.create_table(
        "price_book_versions",
        sa.Column("currency", sa.String(3), nullable=False),
        *_numbers("version"),
        *_times(),
        sa.PrimaryKeyConstraint("currency", name=op.f("pk_price_book_versions")),
    )


def _quotas() -> None:
    def limited() -> list[sa.Column[object]]:
        lengths = {"scope": 32, "subject": 40, "period": 32, "unit": 32}
        return [sa.Column(name, sa.String(length), nullable=False) for name, length in lengths.items()]

    def checks(table: str) -> list[sa.CheckConstraint]:
        rules = {"scope": _SCOPES, "period": _PERIODS, "unit": _UNITS}
        return [sa.CheckConstraint(rule, name=op.f(f"ck_{table}__{name}")) for name, rule in rules.items()]

    op.create_table(
        "quotas",
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        *limited(),
        sa.Column("amount_tokens", sa.BigInteger(), nullable=True),
        sa.Column("amount_cost", _exact(), nullable=True),
        sa.Column("soft", sa.Boolean(), nullable=False),
        sa.Column("suspends", sa.Boolean(), nullable=False),
        *_times(),
        *checks("quotas"),
        sa.CheckConstraint(
            "CASE unit WHEN 'tokens' THEN amount_tokens ELSE amount_cost END IS NOT NULL", name=op.f("ck_quotas__amount")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_quotas")),
        sa.UniqueConstraint("org_id", "scope", "subject", "period", "unit", name=op.f("uq_quotas__org_id_scope_subject_period_unit")),
    )
    suspends = sa.text("suspends")
    op.create_index("ix_quotas__suspends", "quotas", ["org_id"], postgresql_where=suspends, sqlite_where=suspends)
    op.create_table(
        "quota_notices",
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        *limited(),
        sa.Column("period_start", sa.DateTime(timezone=True), nullable=False),
        sa.Column("percent", sa.Integer(), nullable=False),
        sa.Column("amount", sa.String(40), nullable=False),
        sa.Column("used", sa.String(40), nullable=False),
        *_times(),
        *checks("quota_notices"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_quota_notices")),
        sa.UniqueConstraint(
            "org_id", "scope", "subject", "period", "unit", "period_start", "percent",
            name=op.f("uq_quota_notices__org_id_scope_subject_period_unit_period_start_percent"),
        ),
    )  # fmt: skip
    op.create_index("ix_quota_notices__org_id_id", "quota_notices", ["org_id", "id"])


def _reservations() -> None:
    op.create_table(
        "usage_reservations",
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=True),
        sa.Column("api_key_id", sa.String(40), nullable=True),
        sa.Column("deployment_id", sa.Uuid(), nullable=True),
        sa.Column("provider", sa.String(64), nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        *_numbers("tokens_in", "tokens_out"),
        sa.Column("cost_held", _exact(), nullable=False),
        sa.Column("currency", sa.String(3), nullable=False),
        *[sa.Column(name, sa.Boolean(), nullable=False) for name in ("settles_itself", "settled", "released", "settled_late")],
        *_numbers("tokens_overrun"),
        sa.Column("cost_overrun", _exact(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        *_times(),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_usage_reservations")),
    )
    held = sa.text("NOT settled")
    op.create_index(
        "ix_usage_reservations__held", "usage_reservations", ["org_id", "expires_at"], postgresql_where=held, sqlite_where=held
    )
    op.create_index("ix_usage_reservations__org_id_id", "usage_reservations", ["org_id", "id"])
    op.create_index("ix_usage_reservations__expires_at", "usage_reservations", ["expires_at"])
    abandoned = sa.text("settles_itself AND NOT settled")
    op.create_index(
        "ix_usage_reservations__abandoned", "usage_reservations", ["expires_at", "org_id"], postgresql_where=abandoned, sqlite_where=abandoned
    )
    kept = "org_id, id, user_id, api_key_id, deployment_id, provider, model"
    _run(
        f"INSERT INTO usage_reservations ({kept}, tokens_in, tokens_out, cost_held, currency, settles_itself, settled, released, settled_late, "  # noqa: S608
        f"tokens_overrun, cost_overrun, expires_at, created_at, updated_at) SELECT {kept}, tokens_in_estimate, max_tokens, cost_estimate, "
        "currency, true, false, false, false, 0, 0, expires_at, created_at, updated_at FROM model_calls"
    )
    op.drop_table("model_calls")


def downgrade() -> None:
    op.drop_index("ix_deployments__capped", "deployments")
    for column in ("resumed_until", "suspended_for"):
        op.drop_column("deployments", column)
    _model_calls_again()
    for table in ("quota_notices", "quotas", "price_book_versions", "prices", "usage_counters", "usage_rollups"):
        op.drop_table(table)
    # What came before knows no corrections.
    _run("DELETE FROM usage_events WHERE adjusts <> ''")
    _alter_events(_TOKENS, drop=("reason", "adjusts", "price_id", "stated_cost"))
    _day_rollups_again()


def _model_calls_again() -> None:
    op.create_table(
        "model_calls",
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("user_id", sa.Uuid(), nullable=True),
        sa.Column("api_key_id", sa.String(40), nullable=True),
        sa.Column("deployment_id", sa.Uuid(), nullable=True),
        sa.Column("provider", sa.String(64), nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        *_numbers("tokens_in_estimate", "max_tokens"),
        sa.Column("cost_estimate", _exact(), nullable=False),
        sa.Column("currency", sa.String(3), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        *_times(),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_model_calls")),
    )
    op.create_index("ix_model_calls__org_id", "model_calls", ["org_id"])
    op.create_index("ix_model_calls__expires_at", "model_calls", ["expires_at"])
    kept = "org_id, id, user_id, api_key_id, deployment_id, provider, model"
    _run(
        f"INSERT INTO model_calls ({kept}, tokens_in_estimate, max_tokens, cost_estimate, currency, expires_at, created_at, updated_at) "  # noqa: S608
        f"SELECT {kept}, tokens_in, tokens_out, cost_held, currency, expires_at, created_at, updated_at FROM usage_reservations "
        "WHERE settles_itself AND NOT settled"
    )
    op.drop_table("usage_reservations")


def _day_rollups_again() -> None:
    none = "0" * 32
    op.create_table(
        "usage_rollups",
        sa.Column("org_id", sa.Uuid(), nullable=False),
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("provider", sa.String(64), nullable=False),
        sa.Column("model", sa.String(128), nullable=False),
        sa.Column("deployment_id", sa.Uuid(), nullable=False),
        sa.Column("currency", sa.String(3), nullable=False),
        *_numbers("events", "tokens_in", "tokens_out", "tokens_total"),
        sa.Column("cost", _exact(), nullable=False),
        *_numbers("unpriced_events"),
        *_times(),
        sa.PrimaryKeyConstraint("org_id", "day", "provider", "model", "deployment_id", "currency", name=op.f("pk_usage_rollups")),
    )
    if _is_sqlite():
        day, deployment, at = "date(occurred_at)", f"coalesce(deployment_id, '{none}')", "strftime('%Y-%m-%d %H:%M:%f000', 'now')"
    else:
        day, deployment, at = "(occurred_at AT TIME ZONE 'UTC')::date", f"coalesce(deployment_id, '{none}'::uuid)", "now()"
    _run(
        "INSERT INTO usage_rollups (org_id, day, provider, model, deployment_id, currency, events, tokens_in, tokens_out, tokens_total, cost, "  # noqa: S608
        f"unpriced_events, created_at, updated_at) SELECT org_id, {day}, provider, model, {deployment}, currency, count(*), sum(tokens_in), "
        "sum(tokens_out), sum(tokens_total), coalesce(sum(cost), 0), sum(CASE WHEN cost IS NULL THEN 1 ELSE 0 END), "
        f"{at}, {at} FROM usage_events GROUP BY 1, 2, 3, 4, 5, 6"
    )
