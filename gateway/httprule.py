"""``google.api.http`` of the methods, read from the descriptors, as bindings."""

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator

from google.api import annotations_pb2, http_pb2
from google.protobuf.descriptor import FieldDescriptor, MethodDescriptor, ServiceDescriptor

from gateway.convert import is_plain_message, type_of

PACKAGES = ("clawplane.user.v1", "clawplane.deployment.v1")
_VARIABLE = re.compile(r"\{([a-z][a-z0-9_.]*)(?:=\*)?\}")
_LITERAL = re.compile(r"[A-Za-z0-9_.~:/-]*\Z")


@dataclasses.dataclass(frozen=True)
class Binding:
    """One way to call a method over HTTP; `body` is "*", the name of a field, or "" for none."""

    rpc: MethodDescriptor
    http_method: str
    template: str
    variables: tuple[str, ...]
    body: str

    def route(self) -> str:
        """The template in Starlette's words; variables get names by position, since Starlette's hold no dots."""
        numbers = iter(range(len(self.variables)))
        return _VARIABLE.sub(lambda _: f"{{p{next(numbers)}:segment}}", self.template)


def services(packages: Iterable[str] = PACKAGES) -> Iterator[ServiceDescriptor]:
    """The services of all stubs in the packages, by name."""
    found: dict[str, ServiceDescriptor] = {}
    for package in packages:
        for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
            if info.name.endswith("_pb2"):
                module = importlib.import_module(f"{package}.{info.name}")
                found |= {service.full_name: service for service in module.DESCRIPTOR.services_by_name.values()}
    return (found[name] for name in sorted(found))


def bindings(service: ServiceDescriptor) -> Iterator[Binding]:
    """The bindings of a service's methods; ValueError, which names the method, for a rule that cannot be served."""
    for rpc in service.methods:
        options = rpc.GetOptions()
        if not options.HasExtension(annotations_pb2.http):
            continue
        rule = options.Extensions[annotations_pb2.http]
        for one in (rule, *rule.additional_bindings):
            yield _binding(rpc, one)


def _binding(rpc: MethodDescriptor, rule: http_pb2.HttpRule) -> Binding:
    pattern = rule.WhichOneof("pattern")
    if pattern not in ("get", "post", "put", "patch", "delete"):
        raise ValueError(f"{rpc.full_name}: google.api.http needs get, post, put, patch or delete")
    if rpc.client_streaming or (rpc.server_streaming and pattern != "get"):
        raise ValueError(f"{rpc.full_name}: the gateway serves streams of answers to GET only")
    template: str = getattr(rule, pattern)
    if not template.startswith("/") or not _LITERAL.match(_VARIABLE.sub("", template)):
        raise ValueError(f"{rpc.full_name}: the gateway does not know paths like {template}")
    if rule.body not in ("", "*") and rule.body not in rpc.input_type.fields_by_name:
        raise ValueError(f"{rpc.full_name}: its body is no field: {rule.body}")
    variables = tuple(_VARIABLE.findall(template))
    for variable in variables:
        if (field := find(rpc, variable)) is None or field.message_type is not None or field.is_repeated:
            raise ValueError(f"{rpc.full_name}: {variable} in the path is no plain field")
    return Binding(rpc, pattern.upper(), template, variables, rule.body)


def find(rpc: MethodDescriptor, path: str) -> FieldDescriptor | None:
    """The field at a dotted path of the request; None when there is none."""
    descriptor = rpc.input_type
    field: FieldDescriptor | None = None
    for name in path.split("."):
        if field is not None:
            if not is_plain_message(field):
                return None
            descriptor = type_of(field)
        field = descriptor.fields_by_name.get(name)
        if field is None:
            return None
    return field
