"""Time zones: by their names, and when their days begin."""

import zoneinfo
from datetime import UTC, date, datetime, tzinfo


def zone_of(name: str) -> tzinfo:
    """A time zone by its IANA name, UTC for an empty one; ValueError for one that is not known."""
    if name in ("", "UTC"):
        # Needs no database of zones.
        return UTC
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        # A folder or another file of the database is no zone either.
        raise ValueError(f"no time zone: {name}") from None


def midnight(day: date, zone: tzinfo) -> datetime:
    """When a day begins, as UTC; where the clock skips midnight, the moment of the skip."""
    return datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC)
