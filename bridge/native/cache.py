"""Machine code kept on disk between processes.

An entry is a header in JSON, then the code of one or more kernels. It is used only if it belongs to this user, nobody
else can write to it, and its header holds the very key that was asked for and the checksum of what follows; anything
else is built again and replaced. Entries appear whole (a file is written beside and renamed), so processes that start
at once cannot see half of one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

from kernels_pallas.targets import Binary


def folder() -> Path:
    """Where entries lie: $JAXMOE_CACHE_DIR, else jaxmoe in $XDG_CACHE_HOME, else in ~/.cache."""
    if chosen := os.environ.get("JAXMOE_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxmoe"


def _path(key: str) -> Path:
    return folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.kernel"


def load(key: str) -> list[Binary] | None:
    """The kernels kept under this key; None where there are none to be trusted."""
    try:
        with _path(key).open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.getuid() or status.st_mode & 0o022:
                return None
            header, _, code = file.read().partition(b"\n")
        entry = json.loads(header)
        if entry["key"] != key or entry["sha256"] != _checksum(entry["kernels"], code):
            return None
        binaries = []
        for fields in entry["kernels"]:
            length = fields.pop("length")
            binaries.append(Binary(code=code[:length], **{**fields, "sizes": tuple(fields["sizes"])}))
            code = code[length:]
        return binaries
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # not there, or nothing that `store` wrote
        return None


def store(key: str, binaries: list[Binary]) -> None:
    """Keeps the kernels; where that cannot be done, warns: the next process will build them again."""
    kernels: list[dict[str, Any]] = []
    for binary in binaries:
        fields = dataclasses.asdict(binary)
        kernels.append({"length": len(fields.pop("code")), **fields})
    code = b"".join(binary.code for binary in binaries)
    header = {"key": key, "sha256": _checksum(kernels, code), "kernels": kernels}
    path = _path(key)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:  # readable by this user alone
            try:
                file.write(json.dumps(header).encode() + b"\n" + code)
                file.flush()
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        warnings.warn(f"compiled kernels cannot be kept in {path.parent}: {error}", RuntimeWarning, stacklevel=2)


def _checksum(kernels: Any, code: bytes) -> str:
    return hashlib.sha256(json.dumps(kernels, sort_keys=True).encode() + b"\n" + code).hexdigest()
