"""Reading PTX: the one kernel of a module as a list of instructions.

What a statement means is for `translate` to say. Debug directives are dropped here, and scopes are ignored: a name that
is declared twice must have one type.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Address:
    """[base + offset]; base is a register, a parameter or a variable in shared memory."""

    base: str
    offset: int


Operand = str | tuple[str, ...] | Address  # a register, symbol or number; a vector; a place in memory


@dataclass(frozen=True)
class Instruction:
    """One instruction. `guard` is the predicate in front of it, ("%p1", True) for @%p1."""

    text: str
    guard: tuple[str, bool] | None
    name: str
    operands: tuple[Operand, ...]


@dataclass
class Kernel:
    """The kernel of a module. `labels` are indices into `code`."""

    name: str
    params: dict[str, str]  # name -> type
    threads: int  # of a program
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)  # the letters of a register's name -> its type
    local_bytes: int = 0  # of a thread
    shared: dict[str, int] = field(default_factory=dict)  # variables in shared memory -> where, from its beginning
    shared_bytes: int = 0  # that they take: what is asked for at the launch lies behind


_LABEL = re.compile(r"([$\w]+):\s*(?!:)")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%?[a-zA-Z_]+)(?:<\d+>|\d*)$")


def parse(text: str) -> Kernel:
    """The kernel in a module that has one."""
    text = re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", text), flags=re.S)
    head, *more = text.split(".entry ")[1:]
    if more:
        raise NotImplementedError("a module with more than one kernel")
    name, rest = head.split("(", 1)
    params, rest = rest.split(")", 1)
    directives, rest = rest.split("{", 1)
    declared = re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", params.strip())
    (threads,) = re.findall(r"\.(?:req|max)ntid\s+(\d+)", directives)
    kernel = Kernel(name.strip(), {param: kind for kind, param in declared}, int(threads))
    for statement in _statements(_body(rest)):
        _add(kernel, statement)
    return kernel


def _body(text: str) -> str:
    """Up to the brace that closes the function."""
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return text[:at]
    raise ValueError("the function does not end")


def _statements(body: str) -> Iterator[str]:
    body = re.sub(r"^\s*\.loc\s[^\n]*", "", body, flags=re.M)
    for statement in body.split(";"):
        statement = " ".join(statement.split())
        # Braces that open or close a block stand in front; those of vectors never do.
        while statement and statement[0] in "{}":
            statement = statement[1:].strip()
        if statement:
            yield statement


def _add(kernel: Kernel, statement: str) -> None:
    while found := _LABEL.match(statement):
        kernel.labels[found[1]] = len(kernel.code)
        statement = statement[found.end() :].lstrip("{} ")
    if not statement or statement.startswith(".pragma "):
        return
    if found := re.fullmatch(r"\.local \.align \d+ \.b8 __local_depot0\[(\d+)\]", statement):
        kernel.local_bytes = int(found[1])
        return
    if found := re.fullmatch(r"\.shared \.align \d+ \.b32 (\w+)\[(\d+)\]", statement):
        if found[1] in kernel.shared:
            raise NotImplementedError(f"{kernel.name}: {found[1]} is declared twice")
        kernel.shared[found[1]] = kernel.shared_bytes
        kernel.shared_bytes += -(-4 * int(found[2]) // 16) * 16
        return
    if statement.startswith("."):
        registers = _REGISTERS.match(statement)
        if not registers:
            raise NotImplementedError(f"{kernel.name}: {statement}")
        kind, letters = registers.groups()
        if kernel.registers.setdefault(letters, kind) != kind:
            raise NotImplementedError(f"{kernel.name}: {letters} of two types")
        return
    guard, rest = None, statement
    if found := re.match(r"@(!?)(%\w+)\s+", rest):
        guard, rest = (found[2], not found[1]), rest[found.end() :]
    name, _, operands = rest.partition(" ")
    kernel.code.append(Instruction(statement, guard, name, tuple(map(_operand, _split(operands)))))


def _split(text: str) -> list[str]:
    """At the commas that stand in no brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{\[])+", text)
    return [part.strip() for part in parts if part.strip()]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(part.strip() for part in text.strip("{} ").split(","))
    if text.startswith("["):
        base, _, offset = text.strip("[] ").partition("+")
        return Address(base.strip(), int(offset or "0", 0))
    return text


def register_kind(kernel: Kernel, name: str) -> str | None:
    """The type of a register, None for any other name."""
    return kernel.registers.get(name) or kernel.registers.get(name.rstrip("0123456789"))
