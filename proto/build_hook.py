"""Makes the Python stubs in proto/gen from the contracts, at every install and wheel build."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PROTO = Path(__file__).resolve().parent


def generate(out: Path, proto: Path = PROTO) -> None:
    """Writes stubs, type stubs and ``clawplane/descriptors.binpb`` (the image with comments) of ``proto`` under ``out``.

    Made aside, then put in place file by file: whatever imports from there meanwhile finds each file whole.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".gen-") as aside:
        _generate(Path(aside), proto)
        made = {path.relative_to(aside) for path in Path(aside).rglob("*") if path.is_file()}
        for path in sorted(made):
            (out / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(aside) / path, out / path)
    for path in out.rglob("*"):
        if path.is_file() and path.relative_to(out) not in made and "__pycache__" not in path.parts:
            path.unlink()


def _generate(out: Path, proto: Path) -> None:
    from google.api import annotations_pb2
    from google.protobuf import descriptor_pb2
    from grpc_tools import protoc
    from protovalidate._gen.buf.validate import validate_pb  # type: ignore[import-not-found]

    def run(*arguments: str) -> None:
        if protoc.main(["protoc", *arguments]) != 0:
            raise RuntimeError(f"protoc failed: {' '.join(arguments)}")

    includes = [
        f"-I{proto}",
        f"-I{Path(str(protoc.__file__)).parent / '_proto'}",
        f"-I{Path(str(annotations_pb2.__file__)).parents[2]}",
    ]
    sources = sorted(str(path.relative_to(proto)) for path in proto.glob("clawplane/**/*.proto"))
    # protoc-gen-mypy sits beside the interpreter, and a build environment is not on PATH.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])

    (out / "clawplane").mkdir()
    # The protovalidate wheel ships no .proto file: its own descriptor is the source of buf/validate.
    validate_set = out / "validate.binpb"
    descriptors = descriptor_pb2.FileDescriptorSet()
    descriptors.file.add().ParseFromString(validate_pb.desc().proto.to_binary())
    validate_set.write_bytes(descriptors.SerializeToString())
    image = out / "clawplane" / "descriptors.binpb"
    run(
        *includes,
        f"--descriptor_set_in={validate_set}",
        "--include_imports",
        "--include_source_info",
        f"--descriptor_set_out={image}",
        *sources,
    )
    run(f"--descriptor_set_in={image}", f"--python_out={out}", f"--mypy_out=quiet:{out}", "buf/validate/validate.proto", *sources)
    run(f"--descriptor_set_in={image}", f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}", *sources)
    validate_set.unlink()


class StubsHook(BuildHookInterface):
    """Hatchling hook: stubs before any build; in a real wheel they are added to it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        out = PROTO / "gen"
        generate(out)
        # A static force-include would copy stale stubs into site-packages of editable installs, where they win.
        if version == "standard" and self.target_name == "wheel":
            build_data["force_include"].update({str(out / "clawplane"): "clawplane", str(out / "buf"): "buf"})
