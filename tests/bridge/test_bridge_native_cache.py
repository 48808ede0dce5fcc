"""Compiled kernels on disk: what is kept is found again, and nothing else is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bridge.native import build, cache
from kernels_pallas.targets import Binary

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("cache_folder")

BINARIES = [
    Binary("one", b"code of one\n\x00\xff", 32, 0, "QQi", "QQiQ", ("num_rows",)),
    Binary("two", b"more", 128, 4096, "QQ", "QQ", ()),
]


def entry(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_kept_and_found(cache_folder: Path) -> None:
    assert cache.load("key") is None
    cache.store("key", BINARIES)
    assert cache.load("key") == BINARIES
    assert cache.load("another key") is None
    assert entry(cache_folder).stat().st_mode & 0o077 == 0, "nobody else's business"
    cache.store("key", BINARIES[:1])
    assert cache.load("key") == BINARIES[:1], "replaced"


@pytest.mark.parametrize(
    "damage",
    {
        "a bit of the code": lambda b: b[:-1] + bytes([b[-1] ^ 1]),
        "a bit of the header": lambda b: b.replace(b'"threads": 32', b'"threads": 64'),
        "cut off": lambda b: b[:-3],
        "longer": lambda b: b + b"x",
        "empty": lambda b: b"",
        "no header": lambda b: b"\x7fELF" + b,
        "a list for a header": lambda b: b"[]\n" + b,
        "another key": lambda b: b.replace(b'"key": "key"', b'"key": "kez"'),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_damaged_entry_is_not_used(damage: Any, cache_folder: Path) -> None:
    cache.store("key", BINARIES)
    path = entry(cache_folder)
    before = path.read_bytes()
    path.write_bytes(damage[1](before))
    assert path.read_bytes() != before
    assert cache.load("key") is None
    cache.store("key", BINARIES)
    assert cache.load("key") == BINARIES


def test_an_entry_of_somebody_else_is_not_used(cache_folder: Path) -> None:
    """Machine code that others could have written is not run."""
    cache.store("key", BINARIES)
    path = entry(cache_folder)
    path.chmod(0o666)
    assert cache.load("key") is None
    path.chmod(0o600)
    assert cache.load("key") == BINARIES
    if os.getuid() == 0:
        os.chown(path, 12345, -1)
        assert cache.load("key") is None


def test_an_entry_of_another_key_under_this_name_is_not_used(cache_folder: Path) -> None:
    cache.store("key", BINARIES)
    path = entry(cache_folder)
    cache.store("other", BINARIES[:1])
    path.rename(path.with_name("moved"))
    (other,) = [p for p in cache_folder.iterdir() if p.name != "moved"]
    other.rename(path)
    assert cache.load("key") is None


def test_where_nothing_can_be_kept_it_says_so(cache_folder: Path) -> None:
    cache_folder.write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="compiled kernels cannot be kept in .*kernels"):
        cache.store("key", BINARIES)
    assert cache.load("key") is None


def test_several_processes_at_once(cache_folder: Path) -> None:
    """Each writes and reads the same entry many times: whatever is read is whole."""
    program = (
        "from bridge.native import cache\nfrom kernels_pallas.targets import Binary\n"
        "import sys\nb = [Binary('k', bytes([int(sys.argv[1])]) * 200_000, 32, 0, 'Q', 'Q', ())]\nseen = 0\n"
        "for _ in range(60):\n    cache.store('key', b)\n    got = cache.load('key')\n"
        "    assert got and len(set(got[0].code)) == 1 and len(got[0].code) == 200_000\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, str(i)]) for i in range(3)]
    assert [process.wait() for process in processes] == [0] * 3
    assert len(list(cache_folder.iterdir())) == 1, "no file is left behind"


def test_the_key_holds_what_matters() -> None:
    """Another jax, triton or source, another key: an entry of theirs is never taken for ours."""
    toolchain = build._toolchain()
    assert f"jax {build.jax.__version__}" in toolchain
    assert "triton" in toolchain
