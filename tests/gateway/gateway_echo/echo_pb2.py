"""What protoc would make of the file below; by hand, since the tests have no protoc."""

from google.api import annotations_pb2  # noqa: F401  text_format finds the extension by name
from google.protobuf import (  # noqa: F401  the pool needs the files that ours imports
    descriptor_pb2,
    descriptor_pool,
    duration_pb2,
    field_mask_pb2,
    message_factory,
    struct_pb2,
    text_format,
    timestamp_pb2,
    wrappers_pb2,
)


def _field(name: str, number: int, kind: str, *, repeated: bool = False, of: str = "", oneof: int | None = None) -> str:
    label = "LABEL_REPEATED" if repeated else "LABEL_OPTIONAL"
    extra = (f' type_name: "{of}"' if of else "") + (f" oneof_index: {oneof}" if oneof is not None else "")
    return f'field {{ name: "{name}" number: {number} label: {label} type: TYPE_{kind}{extra} }}\n'


_THING = "".join(
    [
        _field("id", 1, "STRING"),
        _field("full_name", 2, "STRING"),
        _field("count", 3, "INT64"),
        _field("small", 4, "INT32"),
        _field("flag", 5, "BOOL"),
        _field("color", 6, "ENUM", of=".gateway_echo.Color"),
        _field("made_at", 7, "MESSAGE", of=".google.protobuf.Timestamp"),
        _field("tags", 8, "STRING", repeated=True),
        _field("colors", 9, "ENUM", repeated=True, of=".gateway_echo.Color"),
        _field("part", 10, "MESSAGE", of=".gateway_echo.Part"),
        _field("parts", 11, "MESSAGE", repeated=True, of=".gateway_echo.Part"),
        _field("labels", 12, "MESSAGE", repeated=True, of=".gateway_echo.Thing.LabelsEntry"),
        _field("extra", 13, "MESSAGE", of=".google.protobuf.Struct"),
        _field("raw", 14, "BYTES"),
        _field("ratio", 15, "DOUBLE"),
        _field("maybe", 16, "MESSAGE", of=".google.protobuf.Int32Value"),
        _field("one", 17, "STRING", oneof=0),
        _field("two", 18, "STRING", oneof=0),
        _field("wait", 19, "MESSAGE", of=".google.protobuf.Duration"),
        _field("etag", 20, "STRING"),
        _field("unsigned", 21, "UINT32"),
        'nested_type { name: "LabelsEntry" options { map_entry: true } '
        + _field("key", 1, "STRING")
        + _field("value", 2, "STRING")
        + "}",
        'oneof_decl { name: "either" }',
    ]
)


def _rpc(name: str, http: str, request: str = "Request") -> str:
    return f"""method {{ name: "{name}" input_type: ".gateway_echo.{request}" output_type: ".gateway_echo.Request"
      options {{ [google.api.http] {{ {http} }} }} }}"""


_FILE = f"""
name: "gateway_echo/echo.proto" package: "gateway_echo" syntax: "proto3"
dependency: ["google/api/annotations.proto", "google/protobuf/timestamp.proto", "google/protobuf/struct.proto",
  "google/protobuf/wrappers.proto", "google/protobuf/field_mask.proto", "google/protobuf/duration.proto"]
enum_type {{ name: "Color" value {{ name: "COLOR_UNSPECIFIED" number: 0 }} value {{ name: "COLOR_RED" number: 1 }} }}
message_type {{ name: "Part" {_field("name", 1, "STRING")} {_field("size", 2, "INT32")} }}
message_type {{ name: "Thing" {_THING} }}
message_type {{ name: "Request" {_field("thing", 1, "MESSAGE", of=".gateway_echo.Thing")}
  {_field("update_mask", 2, "MESSAGE", of=".google.protobuf.FieldMask")} {_field("note", 3, "STRING")} {_field("names", 4, "STRING", repeated=True)} }}
service {{ name: "EchoService"
  {_rpc("Query", 'get: "/v1/echo" additional_bindings { get: "/v1/echo/{thing.id}" } additional_bindings { get: "/v1/echo/{thing.id}:read" }')}
  {_rpc("Create", 'post: "/v1/echo" body: "*" additional_bindings { post: "/v1/echo/{thing.id}:make" body: "*" }')}
  {_rpc("Update", 'patch: "/v1/echo/{thing.id}" body: "thing"')}
  {_rpc("Replace", 'put: "/v1/echo/{thing.id}" body: "thing"')}
  {_rpc("Delete", 'delete: "/v1/echo/{thing.id}"')}
  {_rpc("Names", 'post: "/v1/echo:names" body: "names"')}
  {_rpc("Fixed", 'get: "/v1/echo/fixed"')}
}}
"""

_proto = text_format.Parse(_FILE, descriptor_pb2.FileDescriptorProto())
descriptor_pool.Default().AddSerializedFile(_proto.SerializeToString())
DESCRIPTOR = descriptor_pool.Default().FindFileByName("gateway_echo/echo.proto")
Request = message_factory.GetMessageClass(DESCRIPTOR.message_types_by_name["Request"])
