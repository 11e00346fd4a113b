"""Amounts for people."""

_NO_MINOR_UNITS = frozenset(
    ("bif", "clp", "djf", "gnf", "jpy", "kmf", "krw", "mga", "pyg", "rwf", "ugx", "vnd", "vuv", "xaf", "xof", "xpf")
)


def price(amount_minor: int, currency: str) -> str:
    """An amount in minor units, for instance "29.00 USD"."""
    if currency in _NO_MINOR_UNITS:
        return f"{amount_minor} {currency.upper()}"
    return f"{amount_minor // 100}.{amount_minor % 100:02d} {currency.upper()}"
