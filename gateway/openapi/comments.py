"""The comments of the contracts, from the image that the stubs were made with."""

import functools
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.descriptor_pb2 import DescriptorProto, EnumDescriptorProto, FileDescriptorProto, FileDescriptorSet

import clawplane.errors.v1.errors_pb2 as anchor

_MESSAGES, _ENUMS, _SERVICES = 4, 5, 6
_FIELDS, _NESTED, _INNER_ENUMS, _VALUES, _METHODS = 2, 3, 4, 2, 2
Path_ = tuple[int, ...]


@functools.cache
def comments() -> dict[str, str]:
    """Full name -> comment, for every service, method, message, field, enum and value of ours."""
    image = FileDescriptorSet.FromString((Path(anchor.__file__).parents[2] / "descriptors.binpb").read_bytes())
    found: dict[str, str] = {}
    for file in image.file:
        if file.package.startswith("clawplane."):
            names = dict(_names(file))
            for location in file.source_code_info.location:
                name = names.get(tuple(location.path))
                if name and location.leading_comments:
                    found[name] = " ".join(location.leading_comments.split())
    return found


def _names(file: FileDescriptorProto) -> Iterator[tuple[Path_, str]]:
    for number, service in enumerate(file.service):
        name = f"{file.package}.{service.name}"
        yield (_SERVICES, number), name
        for at, method in enumerate(service.method):
            yield (_SERVICES, number, _METHODS, at), f"{name}.{method.name}"
    for number, message in enumerate(file.message_type):
        yield from _in_message(message, (_MESSAGES, number), file.package)
    for number, enum in enumerate(file.enum_type):
        yield from _in_enum(enum, (_ENUMS, number), file.package)


def _in_message(message: DescriptorProto, path: Path_, outer: str) -> Iterator[tuple[Path_, str]]:
    name = f"{outer}.{message.name}"
    yield path, name
    for number, field in enumerate(message.field):
        yield (*path, _FIELDS, number), f"{name}.{field.name}"
    for number, nested in enumerate(message.nested_type):
        yield from _in_message(nested, (*path, _NESTED, number), name)
    for number, enum in enumerate(message.enum_type):
        yield from _in_enum(enum, (*path, _INNER_ENUMS, number), name)


def _in_enum(enum: EnumDescriptorProto, path: Path_, outer: str) -> Iterator[tuple[Path_, str]]:
    name = f"{outer}.{enum.name}"
    yield path, name
    for number, value in enumerate(enum.value):
        yield (*path, _VALUES, number), f"{name}.{value.name}"
