"""What the address of the usage page asks for: the time, what is shown, what it is grouped and filtered by."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Any, NamedTuple

from clawplane.deployment.v1 import usage_event_pb2
from clawplane.deployment.v1 import usage_service_pb2 as rpc
from services.kit.zones import midnight, zone_of

PRESETS = {"1": "Today", "7": "7 days", "30": "30 days", "90": "90 days", "365": "12 months"}
_USUAL = "30"
SHOWN = {"cost": "Cost", "tokens": "Tokens", "calls": "Calls"}
TYPES = {
    usage_event_pb2.UsageType.Name(number).removeprefix("USAGE_TYPE_").lower(): number
    for number in usage_event_pb2.UsageType.values()
    if number
}
_BY_HOUR, _BY_DAY = 2, 92
"""Up to so many days, bars are hours, or days; months beyond."""
_FIRST_YEAR, _LAST_YEAR = 2000, 2200


class Dim(NamedTuple):
    """Something to group and filter by."""

    title: str
    group: "rpc.UsageGroup.ValueType"
    field: str


DIMS = {
    "model": Dim("Model", rpc.USAGE_GROUP_MODEL, "model"),
    "provider": Dim("Provider", rpc.USAGE_GROUP_PROVIDER, "provider"),
    "type": Dim("Type", rpc.USAGE_GROUP_TYPE, "type"),
    "user": Dim("User", rpc.USAGE_GROUP_USER, "user_id"),
    "key": Dim("API key", rpc.USAGE_GROUP_API_KEY, "api_key_id"),
    "deployment": Dim("Deployment", rpc.USAGE_GROUP_DEPLOYMENT, "deployment_id"),
    "agent": Dim("Agent", rpc.USAGE_GROUP_AGENT, "agent_id"),
    "project": Dim("Project", rpc.USAGE_GROUP_PROJECT, "project_id"),
}
"""By the name in the address."""
_PERIODS = {"hour": rpc.USAGE_GROUP_HOUR, "day": rpc.USAGE_GROUP_DAY, "month": rpc.USAGE_GROUP_MONTH}
_FIELDS = {"start": "from", "end": "to", "time_zone": "zone", "group_by": "by"} | {dim.field: name for name, dim in DIMS.items()}


@dataclass(frozen=True)
class Query:
    """What is asked for; what of the address cannot be is left out and named in ``problems``."""

    first: date
    last: date
    zone: tzinfo
    zone_name: str
    days: str
    """The preset; empty when days are given."""
    show: str
    by: str
    filters: Mapping[str, str]
    problems: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, str]) -> "Query":
        """From the query of an address."""
        problems: dict[str, str] = {}
        try:
            zone, name = zone_of(given.get("zone", "")), given.get("zone") or "UTC"
        except ValueError:
            zone, name, problems["zone"] = UTC, "UTC", 'is no time zone that is known; write it as "Europe/Berlin"'
        first, last = (_day(given, name, problems) for name in ("from", "to"))
        days = "" if first or last else given.get("days", _USUAL)
        if not days:
            last = last or max(datetime.now(zone).date(), first or date.min)
            first = first or last - timedelta(days=int(_USUAL) - 1)
        else:
            days = days if days in PRESETS else _USUAL
            last = datetime.now(zone).date()
            first = last - timedelta(days=int(days) - 1)
        assert first is not None
        if first > last:
            problems["from"] = "is after the last day"
            first = last
        filters = {key: given[key].strip()[:128] for key in DIMS if given.get(key, "").strip()}
        if filters.get("type", "chat") not in TYPES:
            problems["type"] = f"must be one of {', '.join(TYPES)}"
            del filters["type"]
        show, by = given.get("show", ""), given.get("by", "")
        return cls(first, last, zone, name, days, show if show in SHOWN else "cost", by if by in DIMS else "model", filters, problems)

    @property
    def period(self) -> str:
        """What a bar is."""
        days = (self.last - self.first).days + 1
        return "hour" if days <= _BY_HOUR else "day" if days <= _BY_DAY else "month"

    @property
    def start(self) -> datetime:
        """The first moment."""
        return midnight(self.first, self.zone)

    @property
    def end(self) -> datetime:
        """The moment after the last."""
        return midnight(self.last + timedelta(days=1), self.zone)

    def axis(self) -> list[datetime]:
        """When each bar begins."""
        if self.period == "hour":
            return [self.start + timedelta(hours=number) for number in range(int((self.end - self.start) / timedelta(hours=1)))]
        days = [self.first + timedelta(days=number) for number in range((self.last - self.first).days + 1)]
        if self.period == "month":
            days = [self.first.replace(day=1), *(day for day in days[1:] if day.day == 1)]
        return [midnight(day, self.zone) for day in days]

    def label(self, when: datetime) -> str:
        """The name of a bar."""
        return when.astimezone(self.zone).strftime({"hour": "%Y-%m-%d %H:%M", "day": "%Y-%m-%d", "month": "%Y-%m"}[self.period])

    def short(self, when: datetime) -> str:
        """The same under the bar."""
        return when.astimezone(self.zone).strftime({"hour": "%H:%M", "day": "%m-%d", "month": "%Y-%m"}[self.period])

    def summary(self, *, by_period: bool) -> rpc.SummarizeUsageRequest:
        """The request for the bars, or for what they add up to beside what was before."""
        groups = [*([_PERIODS[self.period]] if by_period else []), DIMS[self.by].group]
        request = rpc.SummarizeUsageRequest(group_by=groups, time_zone=self.zone_name, compare=not by_period, **self._filtered())
        request.start.FromDatetime(self.start)
        request.end.FromDatetime(self.end - timedelta(seconds=1))
        return request

    def export(self) -> rpc.ExportUsageRequest:
        """The request for all events."""
        request = rpc.ExportUsageRequest(**self._filtered())
        request.start.FromDatetime(self.start)
        request.end.FromDatetime(self.end)
        return request

    def _filtered(self) -> dict[str, Any]:
        return {DIMS[name].field: TYPES[value] if name == "type" else value for name, value in self.filters.items()}


def blamed(violations: Mapping[str, str]) -> dict[str, str]:
    """What a service found wrong, by the names in the address."""
    return {_FIELDS.get(name, name): text for name, text in violations.items()}


def _day(given: Mapping[str, str], name: str, problems: dict[str, str]) -> date | None:
    text = given.get(name, "")
    if not text:
        return None
    try:
        found = date.fromisoformat(text)
    except ValueError:
        problems[name] = "is no day; write it as 2027-03-31"
        return None
    if not _FIRST_YEAR <= found.year <= _LAST_YEAR:
        problems[name] = f"must be from {_FIRST_YEAR} to {_LAST_YEAR}"
        return None
    return found
