"""Whose fault it is that a step failed, and how long to wait."""

import random
from datetime import timedelta

import structlog

from services.deployment_svc.deployments import state
from services.deployment_svc.deployments.models import Deployment
from services.deployment_svc.deployments.state import Step
from services.deployment_svc.markets.driver import ProviderError
from services.deployment_svc.settings import DeploymentSettings
from services.kit.columns import now
from services.kit.errors import Unavailable

log = structlog.get_logger()


def judge(step: Step, d: Deployment, error: Exception, failures: int, settings: DeploymentSettings) -> tuple[str, str, float]:
    """Whom to blame, what to tell the owner, and the pause before the step is repeated, in seconds. ``failures`` counts those in a row."""
    pause = state.backoff(failures, settings) * random.uniform(0.8, 1.2)
    if isinstance(error, ProviderError):
        blame: str = error.blame
        text, pause = str(error), error.retry_after_s or pause
    elif isinstance(error, TimeoutError):
        blame, text = "market", "the market did not answer in time"
    elif isinstance(error, Unavailable):
        blame, text = "market", error.message
    else:
        # Its words are not for the owner, and may hold anything.
        blame, text = "market", "something is wrong on our side; we are told of it"
        log.error("reconcile.failed", deployment_id=d.id, step=step.value, exc_info=error)
    patience = timedelta(seconds=settings.bid_timeout_s + settings.ready_timeout_s)
    if step is Step.LEASE and d.offers_since and now() - d.offers_since > patience:
        # The market takes orders, but nothing comes of the lease. Another provider may do better; nobody knows whose fault it is.
        blame = "patience" if blame == "market" else blame
    return blame, text, pause
