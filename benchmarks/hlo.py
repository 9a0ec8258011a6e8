"""What a compiled program does, read off its text: kernels, and the bytes that each moves."""

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "bf16": 16}
# These give names to what is there.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"}
# These take a part of an operand.
_PARTS = {"slice", "dynamic-slice", "gather"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-~]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|token|bf16|[a-z]+\d+\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel of a program.

    Attributes:
        name: that of the instruction.
        kind: what it is: an operation, or the function that a custom call calls.
        times: how often it runs: more than once in a loop.
        bytes: what it reads and writes, each time.
    """

    name: str
    kind: str
    times: int
    bytes: int

    @property
    def total_bytes(self) -> int:
        """What it moves altogether."""
        return self.times * self.bytes


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    type: str
    opcode: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.rest)
        return found[1] if found else None


_Computations = dict[str, list[_Instruction]]


def kernels_of(text: str) -> list[Kernel]:
    """Reads the kernels of a program.

    A kernel is taken to read its operands once, or of an operand the parts that it says it takes,
    and to write its results once. What it keeps in caches or reads again, its text does not say.

    Args:
        text: `compiled.as_text()`, for a GPU; other backends have the form but not the kernels.

    Raises:
        ValueError: the text has no entry, or a loop of unknown length.
    """
    entry, computations = _parse(text)
    return list(_walk(computations, entry, 1))


def _parse(text: str) -> tuple[str, _Computations]:
    computations: _Computations = {}
    entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            computations[head[2]] = current = []
            entry = head[2] if head[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current.append(_Instruction(*instruction.groups()))
    if not entry:
        raise ValueError(f"text must be that of a compiled program, got {text[:60]!r}...")
    return entry, computations


def _walk(computations: _Computations, name: str, times: int) -> Iterator[Kernel]:
    types = {instruction.name: instruction.type for instruction in computations[name]}
    for instruction in computations[name]:
        match instruction.opcode:
            case opcode if opcode in _FREE:
                continue
            case "while":
                body = instruction.attribute(r"body=%([\w.\-]+)")
                count = instruction.attribute(r'known_trip_count":\{"n":"(\d+)"')
                if body is None or count is None:
                    raise ValueError(f"{instruction.name} is a loop of unknown length.")
                yield from _walk(computations, body, times * int(count))
            case "call":
                called = instruction.attribute(r"to_apply=%([\w.\-]+)")
                yield from _walk(computations, str(called), times)
            case opcode:
                if opcode == "fusion":
                    called = instruction.attribute(r"calls=%([\w.\-]+)")
                    moved = _bytes_of_fusion(instruction, types, computations[str(called)])
                else:
                    operands = dict.fromkeys(instruction.operands)
                    moved = _bytes(instruction.type) + sum(_bytes(types[x]) for x in operands)
                kind = instruction.attribute(r'custom_call_target="([^"]+)"') or opcode
                yield Kernel(instruction.name, kind, times, moved)


def _bytes_of_fusion(fusion: _Instruction, types: dict[str, str], fused: list[_Instruction]) -> int:
    moved = _bytes(fusion.type)
    written = {instruction.name: instruction.type for instruction in fused}
    parameters = {
        int(instruction.rest.partition(")")[0]): instruction.name
        for instruction in fused
        if instruction.opcode == "parameter"
    }
    for index, operand in enumerate(fusion.operands):
        name = parameters[index]
        users = [other for other in fused if name in other.operands]
        # Not those for which it is a place in another array.
        is_first = all(user.operands[0] == name for user in users)
        if users and is_first and all(user.opcode in _PARTS for user in users):
            moved += sum(_bytes(user.type) for user in users)
        elif is_first and [user.opcode for user in users] == ["dynamic-update-slice"]:
            # In place: of the result, there is only written what is new in it.
            moved -= _bytes(users[0].type)
            moved += _bytes(written[users[0].operands[1]])
        else:
            moved += _bytes(types[operand])
    return moved


def _bytes(type_: str) -> int:
    """The size of an array, or of all of a tuple's."""
    return sum(
        math.prod(int(size) for size in sizes.split(",") if size) * _bits(dtype) // 8
        for dtype, sizes in _ARRAY.findall(type_)
    )


def _bits(dtype: str) -> int:
    """The bits of an entry, at least a byte's."""
    if dtype in _BITS:
        return _BITS[dtype]
    return max(8, int(re.findall(r"\d+", dtype)[0]))
