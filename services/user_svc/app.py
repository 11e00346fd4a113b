"""The user service: what it serves and what runs beside."""

from clawplane.user.v1 import access_service_pb2_grpc, entitlement_service_pb2_grpc, user_service_pb2_grpc
from services.kit import partitions
from services.kit.auth import Authenticator
from services.kit.call import Kit
from services.kit.db import Database
from services.kit.server import App
from services.user_svc.access.service import AccessService, resolver
from services.user_svc.base import AuditEvent
from services.user_svc.entitlements.service import EntitlementService
from services.user_svc.settings import UserSettings
from services.user_svc.users.service import UserService

PARTITIONED = {"audit_events": "created_at"}


def create_app(settings: UserSettings) -> App:
    """The table of contents of the user service."""
    db = Database(settings.database_url, settings, "user_svc")
    kit = Kit("user_svc", settings, db, Authenticator(settings, resolver(db)), AuditEvent)
    return App(
        kit=kit,
        services=[
            (user_service_pb2_grpc.add_UserServiceServicer_to_server, UserService(settings)),
            (access_service_pb2_grpc.add_AccessServiceServicer_to_server, AccessService()),
            (entitlement_service_pb2_grpc.add_EntitlementServiceServicer_to_server, EntitlementService(settings)),
        ],
        loops=[partitions.keeper(db, PARTITIONED)],
        starters=[lambda: partitions.ensure(db, PARTITIONED)],
    )
