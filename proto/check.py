"""Checks the contracts: ``buf lint``, and ``buf breaking`` against the previous commit that changed them."""

import subprocess
import sys
import tempfile
import zipfile
from io import BytesIO
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import build_hook

PROTO = Path(__file__).resolve().parent
BUF = str(Path(sys.executable).parent / "buf")


def image(proto: Path, folder: Path) -> Path:
    """The image of the contracts in ``proto``."""
    build_hook.generate(folder, proto)
    return folder / "clawplane" / "descriptors.binpb"


def before(folder: Path) -> Path | None:
    """The contracts as they were in the last commit before the newest change of them; None when there is none."""
    dirty = _git("status", "--porcelain", "--", "proto/clawplane").strip()
    commits = _git("log", "--format=%H", "-n", "2", "--", "proto/clawplane").split()
    commit = commits[0] if dirty and commits else commits[1] if len(commits) > 1 else ""
    if not commit:
        return None
    command = ["git", "archive", "--format=zip", commit, "proto/clawplane"]
    archive = subprocess.run(command, cwd=PROTO.parent, check=True, capture_output=True)
    with zipfile.ZipFile(BytesIO(archive.stdout)) as files:
        files.extractall(folder)
    return folder / "proto"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=PROTO.parent, check=False, capture_output=True, text=True)
    return done.stdout


def main() -> int:
    """Exit status: 0 when all is well."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        now = image(PROTO, folder / "now")
        status = subprocess.run([BUF, "lint", now, "--path", "clawplane"], cwd=PROTO, check=False).returncode
        print("buf lint:", "ok" if status == 0 else "failed")
        old = before(folder / "before")
        if old is None:
            print("buf breaking: skipped, no earlier version of the contracts is in this clone's history")
            return status
        earlier = image(old, folder / "then")
        broken = subprocess.run([BUF, "breaking", now, "--against", earlier, "--path", "clawplane"], cwd=PROTO, check=False).returncode
        print("buf breaking:", "ok" if broken == 0 else "failed")
        return status or broken


if __name__ == "__main__":
    raise SystemExit(main())
