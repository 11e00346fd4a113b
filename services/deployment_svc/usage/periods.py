"""The time that a summary is about, in whole days or hours of a time zone: pure functions.

The clock of a zone decides, so that a day has 23 hours when its clock is put forward. PostgreSQL and SQLite get plain moments: whatever
they know of time zones themselves, both answer alike.
"""

from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta, tzinfo

from clawplane.deployment.v1 import usage_service_pb2 as rpc
from services.kit.errors import InvalidArgument
from services.kit.proto import to_datetime
from services.kit.zones import midnight, zone_of

MOST_DAYS, MOST_DAYS_BY_HOUR = 400, 35
USUAL = timedelta(days=30)
_EARLIEST, _LATEST = datetime(2000, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)
_HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class Span:
    """A time, and the periods that it is split into."""

    zone: tzinfo
    period: str
    """"hour", "day" or "month"; empty: it is not split."""
    start: datetime
    end: datetime
    """The first moment after it."""
    starts: tuple[datetime, ...]
    """When each period begins, in order; the first may have begun before the span."""

    @property
    def days(self) -> int:
        """How many days, of which the first and the last may be parts."""
        return (self._local(self.end - timedelta(microseconds=1)) - self._local(self.start)).days + 1

    def day(self, index: int) -> str:
        """The day that a period begins on, as YYYY-MM-DD."""
        return self._local(self.starts[index]).isoformat()

    def before(self) -> "Span":
        """The span of the same length that ends where this begins. Its n-th period is what this one's n-th is compared with."""
        if self.period == "hour":
            by = self.end - self.start
            return replace(self, start=self.start - by, end=self.start, starts=tuple(start - by for start in self.starts))
        days = timedelta(days=self.days)
        starts = tuple(midnight(self._local(start) - days, self.zone) for start in self.starts)
        return replace(self, start=midnight(self._local(self.start) - days, self.zone), end=self.start, starts=starts)

    def _local(self, when: datetime) -> date:
        return when.astimezone(self.zone).date()


def span_of(request: rpc.SummarizeUsageRequest, period: str, at: datetime) -> Span:
    """What a request asks for at a time; InvalidArgument naming the field that cannot be."""
    zone = _zone(request.time_zone)
    last = _moment(request, "end") if request.HasField("end") else at
    first = _moment(request, "start") if request.HasField("start") else max(last - USUAL, _EARLIEST)
    if period == "hour":
        return _by_hour(first, last, zone)
    one, other = first.astimezone(zone).date(), last.astimezone(zone).date()
    _check(one, other, MOST_DAYS)
    dates = [one + timedelta(days=number) for number in range((other - one).days + 1)]
    if period == "month":
        dates = [one.replace(day=1), *(day for day in dates[1:] if day.day == 1)]
    start, end = midnight(one, zone), midnight(other + timedelta(days=1), zone)
    return Span(zone, period, start, end, tuple(midnight(day, zone) for day in dates) if period else (start,))


def _zone(name: str) -> tzinfo:
    try:
        return zone_of(name)
    except ValueError:
        raise InvalidArgument("time_zone", 'is no time zone that is known; write it as "Europe/Berlin"') from None


def _by_hour(first: datetime, last: datetime, zone: tzinfo) -> Span:
    one, other = _hour(first, zone), _hour(last, zone)
    _check(one, other, MOST_DAYS_BY_HOUR)
    # Where a clock is put back by half an hour, an hour lasts longer.
    hours = sorted({_hour(one + number * _HOUR, zone) for number in range((other - one) // _HOUR + 3)})
    starts = tuple(hour for hour in hours if hour <= other)
    return Span(zone, "hour", one, hours[len(starts)], starts)


def _check(first: date, last: date, most_days: int) -> None:
    if first > last:
        raise InvalidArgument("start", "is after end")
    if last - first > timedelta(days=most_days):
        raise InvalidArgument("end", f"is more than {most_days} days after start")


def _moment(request: rpc.SummarizeUsageRequest, field: str) -> datetime:
    when = to_datetime(getattr(request, field), field)
    if not _EARLIEST <= when <= _LATEST:
        raise InvalidArgument(field, f"must be from {_EARLIEST:%Y} to {_LATEST:%Y}")
    return when


def _hour(when: datetime, zone: tzinfo) -> datetime:
    """When the hour began."""
    return when.astimezone(zone).replace(minute=0, second=0, microsecond=0).astimezone(UTC)
