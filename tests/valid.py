"""Valid requests made from the descriptors: what protovalidate asks for is filled, and every id can be one that exists."""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import protovalidate
from google.api import field_behavior_pb2
from google.protobuf import descriptor_pb2, message_factory, timestamp_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

from services.kit import ids
from tests.test_contract import rule_of

_PREFIX = re.compile(r"([a-z]+)_\[0-9a-f\]\{32\}")
_NOT_WRITABLE = {field_behavior_pb2.OUTPUT_ONLY, field_behavior_pb2.IDENTIFIER, field_behavior_pb2.IMMUTABLE}
_IGNORED_WHEN_EMPTY = 1
LISTED = {
    "model": "gpt-3.2", "clawplane.deployment.v1.OpenModelCallRequest.provider": "openai",
    "clawplane.deployment.v1.ReserveUsageRequest.provider": "openai", "clawplane.deployment.v1.Quota.amount": "1000000",
    # An address that is nobody's: that of a member cannot be invited.
    "clawplane.user.v1.CreateInvitationRequest.email": "nobody@elsewhere.example",
    "clawplane.user.v1.ApiKey.permissions": "usage.read", "clawplane.user.v1.ApiKey.rate": "60/minute",
    "clawplane.deployment.v1.ImportPricesRequest.yaml": 'prices: [{provider: imported, model: m, tokens_in: "1", tokens_out: "2"}]',
}  # fmt: skip
"""What only a service's settings allow: no descriptor says it. By the name of a field, in one message or in all."""
Values = Callable[[str], Sequence[Any]]
"""Field name -> what a field of this name may well hold: the values of rows that exist."""


@dataclass(frozen=True)
class Reference:
    """A field of a request that names a row, by the fields that lead to it."""

    path: tuple[FieldDescriptor, ...]
    prefix: str
    required: bool

    def __str__(self) -> str:
        return ".".join(field.name for field in self.path)


@dataclass(frozen=True)
class Request:
    """A valid request, and which texts in it are of rows that exist."""

    message: Message
    references: tuple[Reference, ...] = ()
    texts: tuple[str, ...] = ()
    required: bool = False
    """Whether it names the row that it is about, not one that it only mentions."""

    def instead(self) -> "Request":
        """The same request about rows that do not exist; nothing else differs, not even the length."""
        raw = self.message.SerializeToString()
        for text in self.texts:
            raw = raw.replace(text.encode(), unknown(text).encode())
        return replace(self, message=type(self.message).FromString(raw))


def allowed_in(field: FieldDescriptor) -> str | None:
    """The value that settings allow in a field; None when they say nothing of it."""
    return LISTED.get(field.full_name) or LISTED.get(field.name)


def unknown(text: str) -> str:
    """A text of the same form that names nothing."""
    return text[:-1] + ("0" if text[-1] != "0" else "1")


def behaviour(field: FieldDescriptor) -> set[int]:
    """What google.api.field_behavior says of a field."""
    return set(field.GetOptions().Extensions[field_behavior_pb2.field_behavior])


def references(kind: Descriptor, path: tuple[FieldDescriptor, ...] = (), *, updates: bool = False) -> Iterator[Reference]:
    """Every field of a request that takes a prefixed id."""
    for field in kind.fields:
        if field_behavior_pb2.OUTPUT_ONLY in behaviour(field) or field in path:
            continue
        here = (*path, field)
        if field.message_type is not None and field.message_type.full_name.startswith("clawplane."):
            if not field.message_type.GetOptions().map_entry:
                yield from references(field.message_type, here, updates=updates)
        elif field.type == FieldDescriptor.TYPE_STRING:
            rules = rule_of(field)
            pattern = rules.repeated.items.string.pattern if field.is_repeated else rules.string.pattern
            if found := _PREFIX.search(pattern):
                empty = rules.repeated.min_items == 0 if field.is_repeated else rules.ignore == _IGNORED_WHEN_EMPTY or re.search(pattern, "")
                yield Reference(here, found.group(1), not empty and len(path) == 0)
            elif field_behavior_pb2.IDENTIFIER in behaviour(field) and updates:
                yield Reference(here, ids.PREFIXES[kind.name], True)


class Maker:
    """Makes the requests of a method. ``rows``: an id by prefix, "" for a kind that no table holds yet."""

    def __init__(self, method: MethodDescriptor, rows: Callable[[str], str], values: Values) -> None:
        self.method, self.rows, self.values = method, rows, values
        self.reads = method.GetOptions().idempotency_level == descriptor_pb2.MethodOptions.NO_SIDE_EFFECTS

    def requests(self) -> list[Request]:
        """The plain request, one more for each id that may be given, and one for each way of a choice."""
        kind = self.method.input_type
        updates = "update_mask" in kind.fields_by_name
        found = list(references(kind, updates=updates))
        needed = [reference for reference in found if reference.required]
        made = [self._request(kind, needed)]
        made += [self._request(kind, [*needed, extra]) for extra in found if not extra.required and self.rows(extra.prefix)]
        for choice in kind.oneofs:
            if len(choice.fields) > 1:
                made += [self._request(kind, needed, field) for field in choice.fields]
        return made

    def _request(self, kind: Descriptor, wanted: Sequence[Reference], choice: FieldDescriptor | None = None) -> Request:
        message = message_factory.GetMessageClass(kind)()
        texts: list[str] = []
        for reference in wanted:
            texts.append(self.rows(reference.prefix))
            assert texts[-1], f"{kind.full_name}.{reference} takes a {reference.prefix}_..., which no table holds"
            self._set(message, reference, texts[-1])
        if "update_mask" in kind.fields_by_name:
            self._mask(message)
        if choice is not None:
            self._fix(message, choice)
        self._repair(message)
        if self.reads:
            # A look-up by something that is no id names a row as well.
            texts += [text for field, text in message.ListFields() if isinstance(text, str) and text in self.values(field.name) and allowed_in(field) is None and text not in texts]
        required = any(reference.required for reference in wanted) or len(texts) > len(wanted)
        return Request(message, tuple(wanted), tuple(texts), required)

    def _set(self, message: Any, reference: Reference, text: str) -> None:
        *parents, last = reference.path
        touched = []
        for field in parents:
            message = getattr(message, field.name).add() if field.is_repeated else getattr(message, field.name)
            touched.append(message)
        if last.is_repeated:
            getattr(message, last.name).append(text)
        else:
            setattr(message, last.name, text)
        if not any(field_behavior_pb2.IDENTIFIER in behaviour(field) for field in reference.path):
            for parent in reversed(touched):
                self._repair(parent)

    def _mask(self, message: Any) -> None:
        """Names one field that may be written, and gives it a value that no row has yet."""
        resource = next(
            field for field in message.DESCRIPTOR.fields
            if field.message_type is not None and any(field_behavior_pb2.IDENTIFIER in behaviour(inner) for inner in field.message_type.fields)
        )  # fmt: skip
        # From the end: what a resource is made of comes first, and has rules of its own.
        for field in reversed(resource.message_type.fields):
            plain = field.type == FieldDescriptor.TYPE_STRING and not field.is_repeated and field.name != "etag"
            if plain and not _NOT_WRITABLE & behaviour(field):
                _best(getattr(message, resource.name), field, _made_up(field))
                message.update_mask.paths.append(field.name)
                return
        raise AssertionError(f"{message.DESCRIPTOR.full_name}: no field to change was found; teach tests/valid.py which one")

    def _repair(self, message: Message) -> None:
        """Fills what is missing until the message is valid."""
        for field in message.DESCRIPTOR.fields:
            is_set = message.HasField(field.name) if field.has_presence else getattr(message, field.name)
            if field_behavior_pb2.REQUIRED in behaviour(field) and not is_set:
                self._fix(message, field)
        for _ in message.DESCRIPTOR.fields:
            broken = next(iter(protovalidate.collect_violations(message)), None)
            if broken is None:
                return
            elements = broken.proto.field.elements if broken.proto.field is not None else ()
            choices = message.DESCRIPTOR.oneofs_by_name
            name = elements[0].field_name if elements else broken.proto.message.partition(":")[0]
            self._fix(message, choices[name].fields[0] if name in choices else message.DESCRIPTOR.fields_by_name[name])
        left = [str(item.proto) for item in protovalidate.collect_violations(message)]
        assert not left, f"{message.DESCRIPTOR.full_name}: tests/valid.py knows no valid value: {left}"

    def _fix(self, message: Any, field: FieldDescriptor) -> None:
        target = getattr(message, field.name)
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            if isinstance(target, timestamp_pb2.Timestamp):
                target.GetCurrentTime()
            else:
                inner = target.add() if field.is_repeated else target
                inner.SetInParent()
                self._repair(inner)
            return
        known, made_up = [] if allowed_in(field) is not None else self.values(field.name), _made_up(field)
        # An id without a prefix is the caller's own to choose, as that of a usage event.
        kind = str if field.type == FieldDescriptor.TYPE_STRING else int
        known = [value for value in known if type(value) is kind]
        # A number, as of a state, is looked for; whoever changes something does not set it to what it is.
        made_up_first = field.name == "id" or (kind is int and not self.reads)
        _best(message, field, [*made_up, *known] if made_up_first else [*known, *made_up])


def _made_up(field: FieldDescriptor) -> Iterable[Any]:
    rules = rule_of(field)
    allowed = allowed_in(field)
    if allowed is not None:
        return [allowed]
    if field.type == FieldDescriptor.TYPE_ENUM:
        return [value.number for value in field.enum_type.values if value.number]
    if field.type == FieldDescriptor.TYPE_BOOL:
        return [True]
    if field.type == FieldDescriptor.TYPE_BYTES:
        return [b"x", b"x" * 32]
    if field.type != FieldDescriptor.TYPE_STRING:
        return [1, 10, 1000]
    text = str(ids.uuid7())
    listed = getattr(rules.repeated.items.string if field.is_repeated else rules.string, "in")
    return [*listed, text, f"{text}@example.com", f"https://example.com/{text}", text.replace("-", ""), f"t{text[-12:]}", "1.0.0", "usd", "1"]


def _best(message: Any, field: FieldDescriptor, candidates: Iterable[Any]) -> None:
    """Sets the first candidate that breaks the fewest rules of the message."""
    tried = []
    for candidate in candidates:
        trial = type(message)()
        trial.CopyFrom(message)
        _put(trial, field, candidate)
        tried.append((len(protovalidate.collect_violations(trial)), len(tried), candidate))
    _put(message, field, min(tried)[2])


def _put(message: Any, field: FieldDescriptor, value: Any) -> None:
    if field.is_repeated:
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)
