"""Messages as JSON Schema, with the comments, the limits and who writes which field."""

from typing import Any

from buf.validate import validate_pb2
from google.api import field_behavior_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from gateway.convert import is_map, type_of
from gateway.openapi.comments import comments

Schema = dict[str, Any]
F = FieldDescriptor
_INT32, _UINT32 = (F.TYPE_INT32, F.TYPE_SINT32, F.TYPE_SFIXED32), (F.TYPE_UINT32, F.TYPE_FIXED32)
_INT64, _UINT64 = (F.TYPE_INT64, F.TYPE_SINT64, F.TYPE_SFIXED64), (F.TYPE_UINT64, F.TYPE_FIXED64)
_PLAIN: dict[int, Schema] = {
    **{kind: {"type": "integer", "format": "int32"} for kind in _INT32},
    **{kind: {"type": "integer", "format": "int32", "minimum": 0} for kind in _UINT32},
    # Written as a text, since JavaScript's numbers do not hold them; read as either.
    **{kind: {"type": ["string", "integer"], "format": "int64"} for kind in _INT64},
    **{kind: {"type": ["string", "integer"], "format": "uint64"} for kind in _UINT64},
    **{kind: {"type": "number"} for kind in (F.TYPE_DOUBLE, F.TYPE_FLOAT)},
    F.TYPE_BOOL: {"type": "boolean"},
    F.TYPE_STRING: {"type": "string"},
    F.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
}
_WELL_KNOWN: dict[str, Schema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]{1,9})?s$", "examples": ["1.5s"]},
    "google.protobuf.FieldMask": {"type": "string", "examples": ["displayName,model"]},
    "google.protobuf.Struct": {"type": "object", "additionalProperties": True},
    "google.protobuf.Value": {},
    "google.protobuf.ListValue": {"type": "array"},
    "google.protobuf.Any": {"type": "object", "properties": {"@type": {"type": "string"}}, "additionalProperties": True},
}
_NUMBERS = {"gte": "minimum", "gt": "exclusiveMinimum", "lte": "maximum", "lt": "exclusiveMaximum"}
_FORMATS = {"email": "email", "uri": "uri", "uuid": "uuid", "hostname": "hostname", "ip": "ip"}


class Schemas:
    """The schemas that a document needs, collected as they are asked for."""

    def __init__(self) -> None:
        self.found: dict[str, Schema] = {}

    def ref(self, message: Descriptor) -> Schema:
        """A reference to a message's schema, or what stands for one of Google's."""
        known = _WELL_KNOWN.get(message.full_name)
        if known is not None:
            return known
        name = short(message.full_name)
        if name not in self.found:
            self.found[name] = {}
            self.found[name] = self.object(message)
        return {"$ref": f"#/components/schemas/{name}"}

    def object(self, message: Descriptor, without: frozenset[str] = frozenset()) -> Schema:
        """A message as an object, without some of its fields."""
        fields = [field for field in message.fields if field.name not in without]
        schema: Schema = {"type": "object", "properties": {field.json_name: self.field(field) for field in fields}}
        if message.full_name in comments():
            schema["description"] = comments()[message.full_name]
        required = [field.json_name for field in fields if is_required(field)]
        if required:
            schema["required"] = required
        return schema | {"additionalProperties": False}

    def field(self, field: FieldDescriptor) -> Schema:
        """One field, with its comment and limits."""
        rules = rules_of(field)
        if is_map(field):
            value = type_of(field).fields_by_name["value"]
            schema: Schema = {"type": "object", "additionalProperties": self._one(value, rules.map.values)}
            schema |= _sizes(rules.map, "min_pairs", "max_pairs", "Properties")
        elif field.is_repeated:
            schema = {"type": "array", "items": self._one(field, rules.repeated.items)}
            schema |= _sizes(rules.repeated, "min_items", "max_items", "Items")
        else:
            schema = dict(self._one(field, rules))
        text = comments().get(f"{field.containing_type.full_name}.{field.name}" if field.containing_type else "")
        behaviour = set(field.GetOptions().Extensions[field_behavior_pb2.field_behavior])
        if text:
            schema["description"] = text
        if field_behavior_pb2.OUTPUT_ONLY in behaviour:
            schema["readOnly"] = True
        if field_behavior_pb2.INPUT_ONLY in behaviour:
            schema["writeOnly"] = True
        if field.GetOptions().debug_redact and schema.get("type") == "string":
            schema["format"] = "password"
        return schema

    def _one(self, field: FieldDescriptor, rules: validate_pb2.FieldRules) -> Schema:
        if field.message_type is not None:
            return self.ref(field.message_type)
        if field.enum_type is not None:
            return self._enum(field.enum_type)
        return _PLAIN[field.type] | limits(rules)

    def _enum(self, enum: EnumDescriptor) -> Schema:
        name = short(enum.full_name)
        said = {value.name: comments().get(f"{enum.full_name}.{value.name}", "") for value in enum.values}
        text = [comments().get(enum.full_name, ""), *(f"`{word}`: {what}" for word, what in said.items() if what)]
        self.found[name] = {"type": "string", "enum": list(said), "description": "\n\n".join(filter(None, text))}
        return {"$ref": f"#/components/schemas/{name}"}


def short(full_name: str) -> str:
    """A name without the package's first and last part: "deployment.Deployment"."""
    return ".".join(part for part in full_name.removeprefix("clawplane.").split(".") if part != "v1")


def rules_of(field: FieldDescriptor) -> validate_pb2.FieldRules:
    """The rules that protovalidate checks."""
    return field.GetOptions().Extensions[validate_pb2.field]


def is_required(field: FieldDescriptor) -> bool:
    """Whether a request must set the field."""
    return field_behavior_pb2.REQUIRED in field.GetOptions().Extensions[field_behavior_pb2.field_behavior] or rules_of(field).required


def limits(rules: validate_pb2.FieldRules) -> Schema:
    """What the rules of a plain value say in JSON Schema's words."""
    kind = rules.WhichOneof("type")
    if kind is None:
        return {}
    found = getattr(rules, kind)
    if kind != "string":
        given = {name for name in _NUMBERS if name in found.DESCRIPTOR.fields_by_name and found.HasField(name)}
        return {_NUMBERS[name]: getattr(found, name) for name in sorted(given)}
    schema: Schema = {}
    if found.HasField("min_len"):
        schema["minLength"] = found.min_len
    if found.HasField("max_len"):
        schema["maxLength"] = found.max_len
    if found.HasField("pattern"):
        schema["pattern"] = found.pattern
    for name, word in _FORMATS.items():
        if found.WhichOneof("well_known") == name:
            schema["format"] = word
    words = list(getattr(found, "in"))
    if words:
        schema["enum"] = words
    if rules.ignore == validate_pb2.IGNORE_IF_ZERO_VALUE and schema:
        return {"anyOf": [{"const": ""}, schema]}
    return schema


def _sizes(rules: Any, least: str, most: str, what: str) -> Schema:
    sizes = {}
    if rules.HasField(least):
        sizes[f"min{what}"] = getattr(rules, least)
    if rules.HasField(most):
        sizes[f"max{what}"] = getattr(rules, most)
    return sizes
