"""Calls to the other service: channels, own credential, deadline, retries."""

import json
import time
from collections.abc import Sequence
from typing import Any

import grpc
import httpx
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.kit.tokens import TokenSigner

_RETRY = {
    "methodConfig": [
        {
            "name": [{}],
            # A service that is being restarted is waited for, as long as the call's deadline lets.
            "waitForReady": True,
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 3,
                # CANCELLED comes from a server that stops before a handler has seen the call.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ]
}


def channel(target: str, *, max_message_bytes: int = 4 * 1024 * 1024) -> grpc.aio.Channel:
    """A channel that retries what was refused with UNAVAILABLE, which the services answer only before they did anything.
    ``target`` is host:port, or several servers as "ipv4:host:port,host:port"."""
    first, *others = target.split(",")
    return grpc.aio.insecure_channel(
        target,
        options=[
            # gRPC would name the whole list as the authority of each call, which is none: servers may refuse it.
            *([("grpc.default_authority", first.partition(":")[2])] if others else []),
            ("grpc.service_config", json.dumps(_RETRY)),
            ("grpc.enable_retries", 1),
            ("grpc.lb_policy_name", "round_robin"),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.http_proxy", ""),
            ("grpc.enable_http_proxy", 0),
        ],
    )


class ServiceCredential:
    """Metadata with this process's own token, signed anew before it runs out."""

    def __init__(self, signer: TokenSigner, permissions: Sequence[str], lifetime_s: int = 600) -> None:
        self._signer, self._permissions, self._lifetime_s = signer, permissions, lifetime_s
        self._token, self._renew_at = "", 0.0

    def __call__(self) -> tuple[tuple[str, str], ...]:
        if time.monotonic() >= self._renew_at:
            self._token = self._signer.sign(self._permissions, lifetime_s=self._lifetime_s)
            self._renew_at = time.monotonic() + self._lifetime_s / 2
        return (("authorization", f"Bearer {self._token}"),)


def ask_health(target: str, timeout_s: float = 3.0) -> str:
    """ "serving", or what is wrong. ``target`` is host:port of a gRPC service, or a URL that answers 200 when all is well."""
    if "://" in target:
        try:
            answer = httpx.get(target, timeout=timeout_s, trust_env=False)
        except httpx.HTTPError as error:
            return type(error).__name__
        return "serving" if answer.status_code == 200 else answer.text
    with grpc.insecure_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            answered = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return str(error.code().name)
    return "serving" if answered.status == health_pb2.HealthCheckResponse.SERVING else "not serving"
