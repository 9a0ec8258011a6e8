"""What a compiled program does, read off its text: kernels, and the bytes that each moves."""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence

_BITS = {"pred": 8, "token": 0, "bf16": 16}
# These give names to what is there.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all"}
# What these do is not said where they stand.
_UNKNOWN = {"conditional", "async-start", "async-update", "async-done", "copy-start", "copy-done"}
# These take a part of an operand.
_PARTS = {"slice", "dynamic-slice", "gather"}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-~]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|token|bf16|[a-z]+\d+\w*)\[([\d,]*)\]")
_BODY = r'"custom_call_config":\{"body":"([^"]*)"'
_SPACE = re.compile(r"\b[su]8\[\d+\]\{0\}\)$")


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
    is_root: bool
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
    and to write its results once: no less, but more where it reads again what no cache has kept.
    Space that libraries get for their own use, an array of bytes among their results, is not
    counted.

    Args:
        text: `compiled.as_text()`, for a GPU; other backends have the form but not the kernels.

    Raises:
        ValueError: the text has no entry, a loop of unknown length, or what is not known here, such
            as branches.
    """
    entry, computations = _parse(text)
    types = {name: _types(instructions) for name, instructions in computations.items()}
    return [
        _kernel(instruction, types[name], computations, times)
        for instruction, name, times in _walk(computations, entry, 1)
        if instruction.opcode not in _FREE
    ]


def cycles_of(
    text: str, cycles_of_kernel: Callable[[Sequence[str], int], float] | None = None
) -> float:
    """Adds up the cycles of a TPU that a program's operations take, by the compiler's estimate.

    Transfers that go on meanwhile have none, and neither have a few operations.

    Args:
        text: `compiled.as_text()`, for a TPU.
        cycles_of_kernel: finds those of a kernel, for which the compiler has no estimate, from the
            names that it has, there and where else it is run, and the bytes that it moves.

    Raises:
        ValueError: the text has no entry, a loop of unknown length, branches, or kernels that
            nothing is known of.
    """
    entry, computations = _parse(text)
    names = collections.defaultdict(list)
    for instructions in computations.values():
        for instruction in instructions:
            names[instruction.attribute(_BODY)].append(instruction.name)
    total = 0.0
    for instruction, _, times in _walk(computations, entry, 1):
        if instruction.opcode == "conditional":
            raise ValueError(f"Which branch of {instruction.name} runs is not known.")
        if instruction.attribute(r'custom_call_target="(tpu_custom_call)"'):
            moved = instruction.attribute(r'"bytes_accessed":"?(\d+)')
            if cycles_of_kernel is None or moved is None:
                raise ValueError(f"What the kernel {instruction.name} takes is not known.")
            total += times * cycles_of_kernel(names[instruction.attribute(_BODY)], int(moved))
            continue
        total += times * int(instruction.attribute(r'"estimated_cycles":"(\d+)"') or 0)
    return total


def sources_of(text: str) -> dict[str, str]:
    """Finds out what a program's instructions come from.

    Args:
        text: `compiled.as_text()`.

    Returns:
        For each instruction that says so, the path of the operation: functions, layers, primitive.

    Raises:
        ValueError: the text has no entry.
    """
    _, computations = _parse(text)
    found = {
        instruction.name: instruction.attribute(r'op_name="([^"]+)"')
        for instructions in computations.values()
        for instruction in instructions
    }
    return {name: source for name, source in found.items() if source}


def _kernel(
    instruction: _Instruction, types: dict[str, str], computations: _Computations, times: int
) -> Kernel:
    opcode = instruction.opcode
    if opcode in _UNKNOWN:
        raise ValueError(f"What {instruction.name} ({opcode}) moves is not known.")
    kind = instruction.attribute(r'custom_call_target="([^"]+)"') or opcode
    if opcode == "fusion":
        called = instruction.attribute(r"calls=%([\w.\-]+)")
        moved = _bytes_of_fusion(instruction, types, computations[str(called)])
    else:
        results = instruction.type
        if kind.startswith("__cu"):
            results = _SPACE.sub("", results)
        moved = _bytes(results) + sum(_bytes(types[x]) for x in dict.fromkeys(instruction.operands))
    return Kernel(instruction.name, kind, times, moved)


def _parse(text: str) -> tuple[str, _Computations]:
    computations: _Computations = {}
    entry = ""
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            computations[head[2]] = current = []
            entry = head[2] if head[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            current.append(_Instruction(bool(instruction[1]), *instruction.groups()[1:]))
    if not entry:
        raise ValueError(f"text must be that of a compiled program, got {text[:60]!r}...")
    return entry, computations


def _walk(
    computations: _Computations, name: str, times: int
) -> Iterator[tuple[_Instruction, str, int]]:
    """All that runs, with the computation that it stands in and how often it does."""
    for instruction in computations[name]:
        match instruction.opcode:
            case "while":
                body = str(instruction.attribute(r"body=%([\w.\-]+)"))
                count = _trip_count(computations, instruction)
                yield from _walk(computations, body, times * count)
            case "call":
                called = instruction.attribute(r"to_apply=%([\w.\-]+)")
                yield from _walk(computations, str(called), times)
            case _:
                yield instruction, name, times


def _trip_count(computations: _Computations, loop: _Instruction) -> int:
    """How often a loop runs: it says so itself, or counts up from zero to a constant."""
    if count := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
        return int(count)
    condition = computations[str(loop.attribute(r"condition=%([\w.\-]+)"))]
    limits = [x.rest for x in condition if x.opcode == "constant" and x.type.startswith("s32[]")]
    if len(limits) != 1 or not any("direction=LT" in x.rest for x in condition):
        raise ValueError(f"{loop.name} is a loop of unknown length.")
    return int(limits[0].partition(")")[0])


def _types(instructions: list[_Instruction]) -> dict[str, str]:
    return {instruction.name: instruction.type for instruction in instructions}


def _bytes_of_fusion(fusion: _Instruction, types: dict[str, str], fused: list[_Instruction]) -> int:
    moved = _bytes(fusion.type)
    fused_types = _types(fused)
    parameters = {
        int(instruction.rest.partition(")")[0]): instruction.name
        for instruction in fused
        if instruction.opcode == "parameter"
    }
    for index, operand in enumerate(fusion.operands):
        users = _users(parameters[index], fused)
        if users and all(user.opcode in _PARTS and is_first for user, is_first in users):
            moved += sum(_bytes(user.type) for user, _ in users)
        elif len(users) == 1 and _is_in_place(*users[0]):
            # Of the result, there is only written what is new in it.
            ((update, _),) = users
            moved -= _bytes(update.type)
            moved += _bytes(fused_types[update.operands[1]])
        else:
            moved += _bytes(types[operand])
    return moved


def _users(name: str, fused: list[_Instruction]) -> list[tuple[_Instruction, bool]]:
    """What takes a value, by another name too, and whether as the first operand.

    Other operands of what takes a part are places.
    """
    users = []
    for other in fused:
        if name in other.operands:
            if other.opcode == "bitcast" and not other.is_root:
                users += _users(other.name, fused)
            else:
                users.append((other, other.operands[0] == name))
    return users


def _is_in_place(user: _Instruction, is_first: bool) -> bool:
    return user.opcode == "dynamic-update-slice" and user.is_root and is_first


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
