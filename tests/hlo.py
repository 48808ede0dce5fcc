"""What a compiled program does, read from XLA's text."""

from __future__ import annotations

import re


def ops(text: str) -> set[str]:
    """The names of all operations in the text of a compiled program, those inside fusions included."""
    return set(re.findall(r"= (?:\(.*?\)|\S+) ([a-z][a-z0-9-]*)\(", text))
