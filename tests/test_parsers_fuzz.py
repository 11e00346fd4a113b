"""Whatever stands where a credential should: the documented error, never an exception, and never somebody."""

import base64
import dataclasses
import ipaddress
import json
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from clawplane.user.v1 import access_service_pb2, sign_in_link_service_pb2
from gateway.dashboard import cookies
from services.kit import errors, keys
from services.kit.auth import Authenticator, Caller
from services.kit.client import CLIENT_AGENT, CLIENT_IP, FORWARDED, client_of
from tests.harness import Stack
from tests.test_auth import code_of

# Whatever is wrong with a credential is found before a database is asked.
pytestmark = pytest.mark.any_engine

ISSUER = "https://clerk.example.com"
CLERKS_KEY = rsa.generate_private_key(65537, 2048)
OK, NOT_FOUND, UNAUTHENTICATED = grpc.StatusCode.OK, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAUTHENTICATED

NUMBERS = st.integers(-(2**70), 2**70) | st.floats() | st.sampled_from([10**400, -(10**400)])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6,
)  # fmt: skip
CLAIMS = st.dictionaries(
    st.sampled_from(["iss", "sub", "aud", "iat", "exp", "nbf", "jti", "permissions", "user", "org", "azp", "sts", "fva"]), JSON, max_size=4
)
HEADERS = st.dictionaries(st.sampled_from(["alg", "typ", "kid", "crit", "b64", "jku", "jwk", "x5u", "zip"]), JSON, max_size=3)
BENDS = st.lists(st.tuples(st.sampled_from(["cut", "put", "drop", "twice", "case", "end"]), st.floats(0, 1), st.text(max_size=4)), max_size=3)
# What an HTTP client can send in a header at all.
BYTES = st.text(st.characters(min_codepoint=0x21, max_codepoint=0xFF, exclude_characters=[chr(one) for one in range(0x7F, 0xA0)]), max_size=60)
ASCII = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=60)
NAMES = ["authorization", "clawplane-org", FORWARDED, CLIENT_IP, CLIENT_AGENT, "x-request-id", "cookie"]


def fuzz(count: int) -> settings:
    """So many examples, however long each takes."""
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


def bend(text: str, bends: list[tuple[str, float, str]]) -> str:
    """A text that is almost the given one."""
    for how, where, other in bends:
        at = int(where * len(text))
        changed = {
            "cut": text[:at], "put": text[:at] + other + text[at:], "drop": text[:at] + text[at + 1 :], "twice": text[:at] + text,
            "case": text[:at] + text[at:].swapcase(), "end": other + text[at:],
        }  # fmt: skip
        text = changed[how]
    return text


def written(header: dict[str, Any], claims: dict[str, Any], sign: Callable[[bytes], bytes]) -> str:
    """A token, whatever stands in it."""
    body = b".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, claims))
    return f"{body.decode()}.{base64.urlsafe_b64encode(sign(body)).rstrip(b'=').decode()}"


@dataclasses.dataclass
class Place:
    """Where credentials come in, and some that hold there."""

    stack: Stack
    authenticators: list[Authenticator]
    texts: list[str]

    async def take(self, metadata: dict[str, Any]) -> list[Caller]:
        """Who calls, to each service; what is refused is refused as documented."""
        found = []
        for authenticator in self.authenticators:
            try:
                found.append(await authenticator.caller(metadata))
            except (errors.Unauthenticated, errors.NotFound):
                continue
        return found


@pytest_asyncio.fixture
async def place(stack: Stack) -> Place:
    """Both services' own ways to tell who calls, and the first's once more with Clerk's key."""
    assert stack.stack.grpc is not None
    own = [app.kit.authenticator for app in stack.stack.grpc.apps]
    pem = CLERKS_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    with_clerk = own[0].settings.model_copy(update={"clerk_issuer": ISSUER, "clerk_jwt_key": pem})
    session, person = await stack.sign_in(), await stack.person()
    minted = [keys.mint(prefix, "test", "key").text for prefix in ("claw", "cp", "sess", "link", "inv")]
    texts = [session.metadata[0][1][7:], person.metadata[0][1][7:], stack.keys["operator_token"], *minted]
    return Place(stack, [*own, dataclasses.replace(own[0], settings=with_clerk)], texts)


@fuzz(150)
@given(which=st.integers(0, 7), bends=BENDS, scheme=st.sampled_from(["Bearer ", "bearer  ", "", "Basic "]), org=st.text(max_size=40) | st.none())
async def test_a_credential_that_is_almost_one_is_none(place: Place, which: int, bends: Any, scheme: str, org: str | None) -> None:
    text = bend(place.texts[which], bends)
    found = await place.take({"authorization": f"{scheme}{text}"} | ({"clawplane-org": org} if org is not None else {}))
    # Of a signature, several texts mean the same bytes; of everything else, one.
    if found and which != 1:
        assert text.strip() == place.texts[which] and not org


@fuzz(100)
@given(header=st.text(max_size=100) | st.binary(max_size=30), org=st.text(max_size=40) | st.binary(max_size=30))
async def test_any_text_is_nobody(place: Place, header: str | bytes, org: str | bytes) -> None:
    assert not await place.take({"authorization": header, "clawplane-org": org})
    assert not await place.take({"authorization": b"Bearer " + header if isinstance(header, bytes) else f"Bearer {header}", "clawplane-org": org})


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
@fuzz(150)
@given(header=HEADERS, claims=CLAIMS, signature=st.binary(max_size=70))
async def test_tokens_that_nobody_signed_are_refused(place: Place, header: Any, claims: Any, signature: bytes) -> None:
    now = int(time.time())
    known = {"iss": "cli", "sub": "cli", "aud": "clawplane", "iat": now, "exp": now + 300, "permissions": ["*"]}
    for algorithm in ("EdDSA", "RS256", "none", "HS256"):
        text = written({"alg": algorithm} | header, known | claims, lambda body: signature)
        assert not await place.take({"authorization": f"Bearer {text}"})
        assert not place.authenticators[0].may_forward(text)


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
@fuzz(150)
@given(header=HEADERS, claims=CLAIMS)
@example(header={}, claims={"exp": 10**400})
@example(header={}, claims={"iat": -(10**400)})
@example(header={}, claims={"iat": float("-inf")})
@example(header={}, claims={"exp": float("nan")})
@example(header={}, claims={"exp": [1], "iat": {}})
@example(header={}, claims={"fva": [10**400, 0]})
@example(header={}, claims={"fva": [float("inf"), True]})
@example(header={}, claims={"fva": [10**300, 1], "iat": 10**300})
@example(header={"kid": ["x"]}, claims={"permissions": [{"a": []}, None], "user": 7, "sub": "user_x"})
@example(header={"crit": ["b64"], "b64": False}, claims={"org": "org_" + "0" * 32, "user": ""})
async def test_whatever_a_signed_token_says_is_taken_or_refused(place: Place, header: Any, claims: Any) -> None:
    now = int(time.time())
    ours = {"iss": "cli", "sub": "cli", "aud": "clawplane", "iat": now, "exp": now + 300, "permissions": ["*"]} | claims
    clerks = {"iss": ISSUER, "sub": "user_1", "azp": "x", "iat": now, "nbf": now - 5, "exp": now + 60, "fva": [0, -1]} | claims
    seed = base64.b64decode(place.stack.keys["seed_cli"])
    own = written({"alg": "EdDSA"} | header, ours, Ed25519PrivateKey.from_private_bytes(seed).sign)
    of_clerk = written({"alg": "RS256"} | header, clerks, lambda body: CLERKS_KEY.sign(body, padding.PKCS1v15(), hashes.SHA256()))
    for text in (own, of_clerk):
        for caller in await place.take({"authorization": f"Bearer {text}"}):
            assert caller.kind == "service" and all(isinstance(one, str) for one in caller.permissions)
        place.authenticators[0].may_forward(text)


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
@fuzz(150)
@given(
    peer=st.text(max_size=60) | st.sampled_from(["ipv4:1.2.3.4:5", "ipv6:[::1%25lo]:9", "ipv6:%5B2001:db8::1%5D:1", "unix:/x", "ipv6:[::ffff:1.2.3.4]:5"]),
    ip=st.text(max_size=60) | st.ip_addresses().map(str) | st.binary(max_size=9), agent=st.text(max_size=300) | st.binary(max_size=9),
    forwarded=st.sampled_from(["good", "bad", "none"]), bends=BENDS,
)  # fmt: skip
async def test_where_a_call_comes_from_is_an_address_or_unknown(place: Place, peer: str, ip: Any, agent: Any, forwarded: str, bends: Any) -> None:
    good = place.stack.signer("gateway").sign(["calls.forward"])
    said = {"good": {FORWARDED: good}, "bad": {FORWARDED: bend(good, bends)}, "none": {}}[forwarded]
    for authenticator in place.authenticators:
        client = client_of(peer, said | {CLIENT_IP: ip, CLIENT_AGENT: agent, "user-agent": agent}, authenticator)
        assert client.ip == "" or ipaddress.ip_address(client.ip)
        assert client.network == "" or ipaddress.ip_network(client.network)
        assert len(client.agent) <= 200 and (client.agent.isprintable() or not client.agent)


@fuzz(100)
@given(name=st.sampled_from([cookies.SESSION, cookies.ORG, cookies.ADDRESS, cookies.BINDING]), raw=st.binary(max_size=400), bends=BENDS, secure=st.booleans())
def test_a_cookie_is_a_short_text_or_nothing(name: str, raw: bytes, bends: Any, secure: bool) -> None:
    jar, sent_as = cookies.Jar(secure=secure), f"__Host-{name}" if secure else name
    bent = bend(f"{sent_as}=sess_test_1_2_3; a=b", bends).encode()
    for cookie in (raw, sent_as.encode() + b"=" + raw, bent, bent + b"; " + raw):
        http = Request({"type": "http", "method": "GET", "path": "/", "query_string": b"", "headers": [(b"cookie", cookie)]})
        assert re.fullmatch(r"[\x20-\x7e]{0,300}", jar.get(http, name))


def sent(values: dict[str, str]) -> Iterator[tuple[bytes, bytes]]:
    """Headers as the bytes that they are on the wire."""
    for name, value in values.items():
        yield name.encode(), value.strip().encode("latin-1")


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
@fuzz(25)
@given(values=st.dictionaries(st.sampled_from(NAMES), BYTES, min_size=1), cookie=BYTES, org=BYTES)
async def test_headers_over_http(stack: Stack, values: dict[str, str], cookie: str, org: str) -> None:
    values |= {"cookie": f"{cookies.SESSION}={cookie}; {cookies.ORG}={org}; {values.get('cookie', '')}"}
    async with httpx.AsyncClient(base_url=stack.url, trust_env=False) as http:
        api = await http.get("/v1/deployments", headers=list(sent(values)))
        page = await http.get("/dashboard", headers=list(sent(values)))
    # 400 only where a header is no text that gRPC can carry.
    assert api.status_code in (400, 401, 404) and api.json()["error"]["code"] == api.status_code
    assert page.status_code == 303 and page.headers["location"].startswith("/dashboard/sign-in")


@fuzz(60)
@given(values=st.dictionaries(st.sampled_from(NAMES), ASCII, min_size=1), credential=st.booleans())
async def test_metadata_over_grpc(place: Place, values: dict[str, str], credential: bool) -> None:
    if credential:
        values["authorization"] = f"Bearer {place.texts[0]}"
    metadata = tuple((name, value) for name, value in values.items())
    code, text = await code_of(place.stack.access.WhoAmI(access_service_pb2.WhoAmIRequest(), metadata=metadata))
    expected = {OK, NOT_FOUND} if credential else {UNAUTHENTICATED}
    assert code in expected, (code, text)


@fuzz(80)
@given(which=st.integers(3, 7), bends=BENDS, text=st.text(max_size=60), prefix=st.booleans())
async def test_links_that_are_none(place: Place, which: int, bends: Any, text: str, prefix: bool) -> None:
    said = bend(place.texts[which], bends) if prefix else text
    request = sign_in_link_service_pb2.RedeemSignInLinkRequest(token=said)
    code, details = await code_of(place.stack.sign_in_links.RedeemSignInLink(request))
    assert code in (NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT), (code, details)


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
@pytest.mark.parametrize("text", ["sess", "sess_", "sess_test", "claw_", "cp_live", "_", "....", "sess_test_1_2_3", "Bearer Bearer x"])
async def test_beginnings_of_credentials(place: Place, text: str) -> None:
    assert not await place.take({"authorization": f"Bearer {text}"})
