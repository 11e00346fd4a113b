"""From where a call comes: the network address and the program, as the audit log, the limits and the list of sessions need them."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from services.kit.auth import Authenticator

FORWARDED, CLIENT_IP, CLIENT_AGENT = "clawplane-forwarded", "clawplane-client-ip", "clawplane-client-agent"
"""Metadata with which the gateway says for whom it calls: its own token, then what it saw."""
_MOST_AGENT = 200
_NETWORK_BITS = 64
"""Of an address of version 6: whoever has one has all of these."""


@dataclass(frozen=True)
class Client:
    """Where a call comes from."""

    ip: str
    """The address; empty where there is none (a local socket)."""
    agent: str
    """What the program calls itself."""

    @property
    def network(self) -> str:
        """What counts as one place: the address, or the first 64 bits of one of version 6."""
        if ":" not in self.ip:
            return self.ip
        return str(ipaddress.ip_network((self.ip, _NETWORK_BITS), strict=False))


def client_of(peer: str, metadata: Mapping[str, str | bytes], authenticator: Authenticator) -> Client:
    """What the connection shows, or what the gateway says; nobody else is believed."""
    if authenticator.may_forward(metadata.get(FORWARDED)):
        return Client(_address(_text(metadata, CLIENT_IP)), _text(metadata, CLIENT_AGENT))
    return Client(_of_peer(peer), _text(metadata, "user-agent"))


def _text(metadata: Mapping[str, str | bytes], name: str) -> str:
    value: Any = metadata.get(name, "")
    return "".join(each for each in value[:_MOST_AGENT] if each.isprintable()) if isinstance(value, str) else ""


def _of_peer(peer: str) -> str:
    kind, _, rest = peer.partition(":")
    return _address(unquote(rest).rpartition(":")[0].strip("[]")) if kind in {"ipv4", "ipv6"} else ""


def _address(text: str) -> str:
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return ""
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
