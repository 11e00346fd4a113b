"""Laws that hold for every method and message of the contracts."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from buf.validate import validate_pb2
from google.api import annotations_pb2, field_behavior_pb2
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor

import clawplane.deployment.v1.deployment_pb2 as anchor
from clawplane.options.v1 import options_pb2
from services.kit.call import Plan

IMAGE = descriptor_pb2.FileDescriptorSet.FromString((Path(anchor.__file__).parents[2] / "descriptors.binpb").read_bytes())
OURS = [file for file in IMAGE.file if file.name.startswith("clawplane/")]
for _file in OURS:
    if "/user/" in _file.name or "/deployment/" in _file.name:
        __import__(_file.name.removesuffix(".proto").replace("/", ".") + "_pb2")


def methods() -> Iterator[MethodDescriptor]:
    """Every RPC."""
    for file in OURS:
        found = descriptor_pool.Default().FindFileByName(file.name)
        for service in found.services_by_name.values():
            yield from service.methods


def rule_of(field: FieldDescriptor) -> validate_pb2.FieldRules:
    """The protovalidate rules of a field."""
    return field.GetOptions().Extensions[validate_pb2.field]  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", list(methods()), ids=lambda method: str(method.full_name))
def test_laws_of_methods(method: MethodDescriptor) -> None:
    options = method.GetOptions()
    rule = options.Extensions[options_pb2.rule]
    assert rule.audience != options_pb2.AUDIENCE_UNSPECIFIED
    assert bool(rule.permission) != (rule.audience == options_pb2.AUDIENCE_PUBLIC)
    assert method.input_type.name == f"{method.name}Request"
    assert not method.client_streaming
    reads = method.name.startswith(
        ("Get", "List", "Lookup", "Check", "Summarize", "Resolve", "Watch", "Find", "Validate", "VerifyApiKey", "WhoAmI", "Export")
    )
    no_side_effects = descriptor_pb2.MethodOptions.NO_SIDE_EFFECTS
    assert (options.idempotency_level == no_side_effects) == reads
    http = options.Extensions[annotations_pb2.http]
    if http.get:
        assert reads and not http.body
    if method.name.startswith("List"):
        names = set(method.input_type.fields_by_name)
        assert {"page_size", "page_token"} <= names and "next_page_token" in method.output_type.fields_by_name
    # The organization of a change comes from the credential alone.
    if not reads and rule.audience == options_pb2.AUDIENCE_ORGANIZATION:
        assert "org_id" not in method.input_type.fields_by_name


@pytest.mark.parametrize("method", list(methods()), ids=lambda method: str(method.full_name))
def test_requests_bound_what_they_take(method: MethodDescriptor) -> None:
    for field in method.input_type.fields:
        rules = rule_of(field)
        if field.name == "id" or field.name.endswith("_id"):
            assert rules.string.pattern or rules.string.max_len or rules.string.uuid, field.full_name
        if field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated:
            bounded = rules.string.max_len or rules.string.pattern or rules.string.email or rules.string.uuid or getattr(rules.string, "in")
            assert bounded, field.full_name
        if field.is_repeated and not (field.message_type and field.message_type.GetOptions().map_entry):
            assert rules.repeated.max_items or rules.repeated.unique, field.full_name


def messages() -> Iterator[tuple[str, descriptor_pb2.DescriptorProto]]:
    """Every message of the public contracts."""
    for file in OURS:
        for message in file.message_type:
            yield f"{file.package}.{message.name}", message


def test_everything_is_commented() -> None:
    for file in OURS:
        said = {tuple(location.path): location.leading_comments.strip() for location in file.source_code_info.location}
        for number, message in enumerate(file.message_type):
            assert said.get((4, number)), f"{file.name}: {message.name}"
            for index, field in enumerate(message.field):
                assert said.get((4, number, 2, index)), f"{file.name}: {message.name}.{field.name}"
        for number, service in enumerate(file.service):
            for index, method in enumerate(service.method):
                assert said.get((6, number, 2, index)), f"{file.name}: {service.name}.{method.name}"
        for number, enum in enumerate(file.enum_type):
            assert enum.value[0].number == 0 and enum.value[0].name.endswith("_UNSPECIFIED")
            for index, value in enumerate(enum.value):
                assert said.get((5, number, 2, index)), f"{file.name}: {value.name}"


SHOWN_ONCE = {
    f"clawplane.user.v1.{name}"
    for name in (
        "CreateSignInLinkResponse.token", "RedeemSignInLinkResponse.token", "SignedIn.token", "SignUpResponse.sign_up_token",
        "FinishOAuthResponse.token", "CreateApiKeyResponse.key", "RotateApiKeyResponse.key", "MintClawKeyResponse.key",
    )
}  # fmt: skip
"""Secrets of our own making, which their owner sees when they are made and never again."""
SECRETS = re.compile(r"(^|_)(token|secret|password|api_key|private_key)$|^key$")


def test_what_is_secret_is_marked_and_only_comes_in() -> None:
    for name, message in messages():
        for field in message.field:
            # A message tells of a key; only a text can be one.
            if field.type == field.TYPE_MESSAGE:
                continue
            if SECRETS.search(field.name) and field.name != "page_token" and not field.name.endswith("page_token"):
                assert field.options.debug_redact, f"{name}.{field.name}"
                if f"{name}.{field.name}" in SHOWN_ONCE:
                    continue
                behaviour = field.options.Extensions[field_behavior_pb2.field_behavior]
                assert field_behavior_pb2.INPUT_ONLY in behaviour, f"{name}.{field.name}"


def test_money_is_never_a_float() -> None:
    floats = (descriptor_pb2.FieldDescriptorProto.TYPE_FLOAT, descriptor_pb2.FieldDescriptorProto.TYPE_DOUBLE)
    for name, message in messages():
        for field in message.field:
            assert field.type not in floats, f"{name}.{field.name}"


def test_only_requests_without_any_rule_skip_the_check_of_rules() -> None:
    """The wrapper's plan says so; here the compiled rules are looked for in the text of the files that a request is made of."""
    skipped = {method.full_name for method in methods() if not Plan.of(method).has_rules}
    for name in skipped:
        service, _, method = name.rpartition(".")
        request = descriptor_pool.Default().FindServiceByName(service).methods_by_name[method].input_type
        proto = descriptor_pb2.DescriptorProto()
        request.CopyToProto(proto)
        plain = all(field.message_type is None or field.message_type.full_name == "google.protobuf.Timestamp" for field in request.fields)
        assert "buf.validate" not in str(proto) and plain, name
    assert skipped <= {f"clawplane.{name}" for name in MAY_SKIP}, skipped


def rules_in(message: Descriptor, seen: set[str]) -> Iterator[str]:
    """The text of every rule in a message and in the messages in it."""
    if message.full_name in seen:
        return
    seen.add(message.full_name)
    yield str(message.GetOptions().Extensions[validate_pb2.message])
    yield from (str(oneof.GetOptions().Extensions[validate_pb2.oneof]) for oneof in message.oneofs)
    for field in message.fields:
        yield str(rule_of(field))
        if field.message_type is not None:
            yield from rules_in(field.message_type, seen)


ASKS_FOR_THE_TIME = re.compile(r"\b(now|lt_now|gt_now|within)\b")


def test_no_rule_of_a_read_asks_for_the_time() -> None:
    """The wrapper remembers which requests of reads are sound (kit/intake.py)."""
    for method in methods():
        if Plan.of(method).is_read:
            assert not [text for text in rules_in(method.input_type, set()) if ASKS_FOR_THE_TIME.search(text)], method.full_name
    known = validate_pb2.FieldRules()
    known.timestamp.gt_now = True
    assert ASKS_FOR_THE_TIME.search(str(known)) and ASKS_FOR_THE_TIME.search('expression: "this > now"')


MAY_SKIP: set[str] = {
    "user.v1.MemberService.LeaveOrganization",
    "user.v1.AccessService.WhoAmI", "user.v1.ChangeService.WatchChanges", "user.v1.SignInLinkService.CreateSignInLink",
    "user.v1.SessionService.RevokeOtherSessions", "user.v1.SessionService.RevokeAllSessions", "user.v1.SignInService.RequestStepUp",
    "user.v1.UserService.DeleteSelf", "deployment.v1.DeploymentService.SummarizeDeployments", "deployment.v1.ModelCallService.GetModelCatalog",
    "deployment.v1.PriceService.ExportPrices",
}  # fmt: skip
"""Requests of which nothing is bound."""
