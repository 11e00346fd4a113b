"""The rules of the house."""

import ast
import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("services/**/*.py"), *ROOT.glob("gateway/**/*.py"), *ROOT.glob("clients/**/*.py")])
FEATURES = ("user_svc", "deployment_svc")


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def under(*parts: str) -> list[Path]:
    """Source files below a folder."""
    return sorted(ROOT.joinpath(*parts).glob("**/*.py"))


def test_the_top_level_is_fixed() -> None:
    for name in ("proto", "services/user_svc", "services/deployment_svc", "gateway", "clients", "migrations", "tests"):
        assert (ROOT / name).is_dir(), name


def test_the_kit_knows_no_feature() -> None:
    for path in under("services", "kit"):
        wrong = [name for name in imports(path) if name.startswith(("services.user_svc", "services.deployment_svc", "gateway"))]
        assert not wrong, (path, wrong)
        # Of the contracts, the kit reads only those that are about calls themselves.
        known = ("clawplane.options.", "clawplane.errors.", "clawplane.audit.")
        wrong = [name for name in imports(path) if name.startswith("clawplane.") and not f"{name}.".startswith(known)]
        assert not wrong, (path, wrong)


@pytest.mark.parametrize("service", FEATURES)
def test_services_never_import_each_other(service: str) -> None:
    others = tuple(f"services.{other}" for other in FEATURES if other != service)
    for path in under("services", service):
        wrong = [name for name in imports(path) if name.startswith((*others, "gateway", "services.cli", "services.embedded"))]
        assert not wrong, (path, wrong)


def test_the_user_service_calls_nobody() -> None:
    for path in under("services", "user_svc"):
        # But the providers that people sign in with.
        outside = () if "oauth" in path.parts else ("httpx", "authlib")
        wrong = [name for name in imports(path) if name.startswith(("clawplane.deployment", "services.kit.clients", *outside))]
        assert not wrong, (path, wrong)


def test_the_gateway_imports_stubs_and_the_kit_only() -> None:
    for path in under("gateway"):
        wrong = [
            name for name in imports(path)
            if name.startswith(("services.", "sqlalchemy", "migrations")) and not name.startswith("services.kit")
        ]  # fmt: skip
        assert not wrong, (path, wrong)
        assert not [name for name in imports(path) if name.startswith(("services.kit.db", "services.kit.columns"))], path


def test_clients_need_stubs_and_grpc_only() -> None:
    known = {*sys.stdlib_module_names, "clawplane", "clawplane_client", "google", "grpc"}
    for path in under("clients", "python"):
        assert not [name for name in imports(path) if name.partition(".")[0] not in known], path


def test_clawplane_stays_a_namespace_package() -> None:
    # An __init__.py in it would hide the stubs of the other folders.
    assert not list(ROOT.glob("**/clawplane/__init__.py"))


def test_files_and_functions_stay_small() -> None:
    for path in SOURCES:
        text = path.read_text()
        assert len(text.splitlines()) <= 300, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                # A function that holds classes or functions is a room of its own; what is in it is counted by itself.
                nested = any(isinstance(inner, ast.ClassDef) for inner in ast.walk(node))
                assert length <= 60 or nested, (path, node.name, length)


def test_every_module_says_what_it_is() -> None:
    for path in SOURCES:
        if path.name != "__init__.py":
            assert ast.get_docstring(ast.parse(path.read_text())), path


def test_features_do_not_go_around_the_tenant_filter() -> None:
    """The criteria do not cover tables, raw SQL or sessions of one's own."""
    allowed = {
        "services/deployment_svc/deployments/models.py": {"text"},
        "services/deployment_svc/payments/models.py": {"text"},
        "services/deployment_svc/quotas/models.py": {"text"},
        "services/deployment_svc/usage_reservations/models.py": {"text"},
        "services/user_svc/invitations/models.py": {"text"},
        "services/user_svc/organizations/models.py": {"text"},
        "services/user_svc/users/models.py": {"text"},
    }
    for service in FEATURES:
        for path in under("services", service):
            # What only PostgreSQL can do is written as SQL, and says itself whose rows it means.
            known = {"text"} if path.name == "postgres.py" else allowed.get(str(path.relative_to(ROOT)), set())
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("text", "AsyncSession"):
                    assert node.func.id in known, (path, node.lineno)
                if isinstance(node, ast.Attribute) and node.attr in ("__table__", "exec_driver_sql"):
                    raise AssertionError((path, node.lineno, node.attr))


def test_handlers_never_look_at_credentials() -> None:
    for service in FEATURES:
        for path in under("services", service):
            assert "invocation_metadata" not in path.read_text(), path


def test_one_file_knows_the_transports() -> None:
    assert [path.relative_to(ROOT).as_posix() for path in SOURCES if any("pygrpc_native" in name for name in imports(path))] == ["services/kit/server.py"]


def test_every_mutable_table_has_its_times() -> None:
    immutable = {"usage_events", "audit_events"}
    for service in FEATURES:
        for module in pkgutil.walk_packages([str(ROOT / "services" / service)], f"services.{service}."):
            if module.name.endswith(".models"):
                importlib.import_module(module.name)
        base = importlib.import_module(f"services.{service}.base").Base
        for name, table in base.metadata.tables.items():
            assert "created_at" in table.columns, name
            assert "updated_at" in table.columns or name in immutable, name


def test_every_tenant_table_that_grows_has_the_organization_in_its_key() -> None:
    from services.deployment_svc.base import Base

    importlib.import_module("services.deployment_svc.usage.models")
    for name in ("usage_events", "usage_rollups", "audit_events"):
        assert next(iter(Base.metadata.tables[name].primary_key.columns)).name == "org_id", name


