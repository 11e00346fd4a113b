"""Google, Microsoft and GitHub as one server in its own process: codes, PKCE, signed ID tokens, and faults."""

import base64
import hashlib
import hmac
import secrets
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlencode

import jwt
from cryptography.hazmat.primitives.asymmetric import rsa
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from tests.simulators.market import Faults, Json, SimulatorProcess, cut, serve

CLIENT_ID, CLIENT_SECRET = "clawplane-at-simulator", "simulated-client-secret-0123456789"
TENANT = "9188040d-6c67-4c5b-b112-36a304b66dad"
_CODE_S = 60


class OAuthSimulator(SimulatorProcess):
    """The server. ``register(redirect_uri)`` first: no other address is sent anybody back to."""

    module = "tests.simulators.oauth"

    def settings(self) -> Json:
        """The user service's settings that lead here."""
        urls = {"google_url": f"{self.url}/google", "microsoft_url": f"{self.url}/microsoft/common/v2.0", "github_url": f"{self.url}/github"}
        named = {f"oauth_{name}": url for name, url in urls.items()} | {"oauth_github_api_url": f"{self.url}/github-api"}
        for name in ("google", "microsoft", "github"):
            named |= {f"oauth_{name}_client_id": CLIENT_ID, f"oauth_{name}_client_secret": CLIENT_SECRET}
        return named


@dataclass
class Code:
    """What was given to a browser, once."""

    provider: str
    person: Json
    redirect_uri: str
    challenge: str
    nonce: str
    made_at: float = field(default_factory=time.time)


class Providers:
    """Everything that they know."""

    def __init__(self) -> None:
        self.faults = Faults()
        self.redirects: set[str] = set()
        self.people: dict[str, Json] = {}
        self.codes: dict[str, Code] = {}
        self.tokens: dict[str, Json] = {}
        self.exchanges = 0
        self.keys: dict[str, Any] = {}
        self.rotate()

    def rotate(self) -> None:
        """A new signing key; the old one is no longer published."""
        self.keys = {f"key-{secrets.token_hex(4)}": rsa.generate_private_key(public_exponent=65537, key_size=2048)}

    def jwks(self) -> Json:
        """What is published."""
        found = []
        for name, key in self.keys.items():
            one = jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True)
            found.append(one | {"kid": name, "use": "sig", "alg": "RS256"})
        return {"keys": found}

    def id_token(self, code: Code, issuer: str, fault: Json) -> str:
        """A signed token, as it should be but for what the fault says: ``claims`` to change (null: to leave out), ``sign``."""
        now = int(time.time())
        claims = {"iss": issuer, "aud": CLIENT_ID, "iat": now, "exp": now + 3600, "nonce": code.nonce} | code.person | fault.get("claims", {})
        claims = {name: value for name, value in claims.items() if value is not None}
        (name, key), *_ = self.keys.items()
        how = fault.get("sign", "")
        if how == "none":
            return jwt.encode(claims, None, algorithm="none", headers={"kid": name})
        if how == "shared":
            return jwt.encode(claims, "a-shared-secret-of-thirty-two-bytes!", algorithm="HS256", headers={"kid": name})
        if how == "stranger":
            key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        return jwt.encode(claims, key, algorithm="RS256", headers={"kid": "unknown" if how == "unknown" else name})


def base(request: Request) -> str:
    """The address of this server."""
    return str(request.base_url).rstrip("/")


def sign_in_routes(known: Providers) -> list[Route]:
    """Where browsers and codes go."""

    async def configuration(request: Request) -> Response:
        if known.faults.take("configuration").get("status"):
            return JSONResponse({}, 503)
        url = base(request)
        provider = "google" if "google" in request.url.path else "microsoft"
        root = f"{url}/{provider}"
        issuer = root if provider == "google" else f"{root}/{{tenantid}}/v2.0"
        ends = {"authorization_endpoint": f"{root}/authorize", "token_endpoint": f"{root}/token", "jwks_uri": f"{url}/jwks"}
        return JSONResponse({"issuer": issuer, **ends})

    async def authorize(request: Request) -> Response:
        """The person is signed in and has agreed: the browser is sent back at once."""
        query, provider = request.query_params, request.url.path.split("/")[1]
        needed = {"response_type": "code", "client_id": CLIENT_ID, "code_challenge_method": "S256"}
        wrong = [name for name, value in needed.items() if query.get(name) != value]
        if wrong or query.get("redirect_uri") not in known.redirects or not query.get("state") or len(query.get("code_challenge", "")) != 43:
            return JSONResponse({"error": "invalid_request", "error_description": f"{wrong} {dict(query)}"}, 400)
        if provider != "github" and ("openid" not in query.get("scope", "") or not query.get("nonce")):
            return JSONResponse({"error": "invalid_scope"}, 400)
        code = secrets.token_urlsafe(24)
        known.codes[code] = Code(provider, known.people[provider], query["redirect_uri"], query["code_challenge"], query.get("nonce", ""))
        return RedirectResponse(f"{query['redirect_uri']}?{urlencode({'code': code, 'state': query['state']})}", 302)

    async def token(request: Request) -> Response:
        form, provider = await request.form(), request.url.path.split("/")[1]
        known.exchanges += 1
        fault = known.faults.take("token", provider)
        if fault.get("cut"):
            await cut(request)
        if fault.get("status"):
            return JSONResponse({"error": "server_error"}, fault["status"])
        if fault.get("text"):
            return Response(fault["text"])
        # GitHub says what is wrong with 200.
        refused = 200 if provider == "github" else 400
        secret = hmac.compare_digest(str(form.get("client_secret", "")), CLIENT_SECRET)
        if form.get("client_id") != CLIENT_ID or not secret or form.get("grant_type") != "authorization_code":
            return JSONResponse({"error": "invalid_client"}, 401 if refused == 400 else 200)
        code = known.codes.pop(str(form.get("code", "")), None)
        challenge = base64.urlsafe_b64encode(hashlib.sha256(str(form.get("code_verifier", "")).encode()).digest()).decode().rstrip("=")
        good = code is not None and code.provider == provider and code.challenge == challenge and code.redirect_uri == form.get("redirect_uri")
        if code is None or not good or time.time() - code.made_at > _CODE_S:
            return JSONResponse({"error": "invalid_grant" if refused == 400 else "bad_verification_code"}, refused)
        access = secrets.token_urlsafe(24)
        known.tokens[access] = code.person
        answer: Json = {"access_token": access, "token_type": "bearer", "scope": str(form.get("scope", ""))}
        if provider != "github":
            tenant = code.person.get("tid", "")
            issuer = f"{base(request)}/google" if provider == "google" else f"{base(request)}/microsoft/{tenant}/v2.0"
            answer |= {"expires_in": 3600, "id_token": known.id_token(code, issuer, fault)}
        return JSONResponse(answer)

    return [
        Route("/google/.well-known/openid-configuration", configuration),
        Route("/microsoft/common/v2.0/.well-known/openid-configuration", configuration),
        Route("/google/authorize", authorize), Route("/microsoft/authorize", authorize), Route("/github/login/oauth/authorize", authorize),
        Route("/google/token", token, methods=["POST"]), Route("/microsoft/token", token, methods=["POST"]),
        Route("/github/login/oauth/access_token", token, methods=["POST"]),
    ]  # fmt: skip


def build() -> Starlette:
    """The application."""
    known = Providers()

    async def github_api(request: Request) -> Response:
        person = known.tokens.get(request.headers.get("authorization", "").removeprefix("Bearer "))
        if person is None:
            return JSONResponse({"message": "Bad credentials"}, 401)
        if known.faults.take("api", request.url.path).get("status"):
            return JSONResponse({"message": "down"}, 502)
        return JSONResponse(person["emails"] if request.url.path.endswith("/emails") else person["user"])

    async def jwks(request: Request) -> Response:
        return JSONResponse(known.jwks())

    async def control(request: Request) -> Response:
        body = await request.json()
        match request.path_params["what"]:
            case "register":
                known.redirects.add(body["redirect_uri"])
            case "person":
                known.people[body["provider"]] = body["person"]
            case "fault":
                known.faults.arm(body["pattern"], body["fault"])
            case "rotate":
                known.rotate()
        return JSONResponse({"exchanges": known.exchanges})

    return Starlette(
        routes=[
            *sign_in_routes(known),
            Route("/github-api/user", github_api), Route("/github-api/user/emails", github_api), Route("/jwks", jwks),
            Route("/control/{what}", control, methods=["POST"]),
        ]
    )  # fmt: skip


if __name__ == "__main__":
    serve(build())
