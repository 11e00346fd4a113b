"""OAuthService: signing in with an account elsewhere."""

from sqlalchemy.ext.asyncio import AsyncSession

from clawplane.user.v1 import oauth_service_pb2 as rpc
from clawplane.user.v1 import oauth_service_pb2_grpc, session_pb2
from services.kit import keys
from services.kit.call import Call
from services.kit.db import ALL
from services.kit.errors import NotFound, SignInFailed
from services.kit.secrets import SecretBox
from services.user_svc.oauth import accounts, providers, repository
from services.user_svc.oauth.rules import own_path
from services.user_svc.settings import UserSettings
from services.user_svc.sign_in.start import Starter
from services.user_svc.users.service import UserService


class OAuthService(oauth_service_pb2_grpc.OAuthServiceServicer):
    """See proto/clawplane/user/v1/oauth_service.proto."""

    def __init__(self, settings: UserSettings, users: UserService, box: SecretBox, starter: Starter) -> None:
        self.settings, self.users, self.box, self.starter = settings, users, box, starter
        self.providers = providers.configured(settings)

    async def ListOAuthProviders(self, request: rpc.ListOAuthProvidersRequest, call: Call) -> rpc.ListOAuthProvidersResponse:
        found = [rpc.OAuthProvider(id=provider.name, title=provider.title) for provider in self.providers.values()]
        return rpc.ListOAuthProvidersResponse(providers=found)

    async def StartOAuth(self, request: rpc.StartOAuthRequest, call: Call) -> rpc.StartOAuthResponse:
        provider = self.providers.get(request.provider)
        if provider is None:
            raise NotFound("OAuth provider")
        key = keys.mint(repository.PREFIX, self.settings.key_environment, repository.ID_PREFIX)
        # The provider may have to be asked where its page is: before anything is written.
        url = await provider.authorization_url(key.text, *repository.secrets_of(self.box, key.id))

        async def work(session: AsyncSession) -> None:
            repository.begin(session, self.box, key, provider.name, request.browser_token, own_path(request.redirect_path))

        await call.run(work, ALL)
        return rpc.StartOAuthResponse(authorization_url=url)

    async def FinishOAuth(self, request: rpc.FinishOAuthRequest, call: Call) -> rpc.FinishOAuthResponse:
        # Used up before the provider is asked: whatever it answers, this state is over.
        state = await call.kit.db.run(lambda session: repository.take(session, self.box, request.state, request.browser_token), ALL)
        provider = self.providers.get(state.provider) if state is not None else None
        if state is None or provider is None:
            raise SignInFailed()
        profile = await provider.profile(request.code, *repository.secrets_of(self.box, state.id))

        async def work(session: AsyncSession) -> session_pb2.SignedIn:
            user = await accounts.of_profile(session, self.users, call, profile)
            return self.starter.start(session, call, user, profile.provider)

        answer = await self.users.retry_username(call, work, False, ALL)
        return rpc.FinishOAuthResponse(session=answer.session, token=answer.token, redirect_path=state.redirect_path)
