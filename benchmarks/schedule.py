"""What a kernel takes on a TPU: the instructions that the compiler wrote for it, loop by loop."""

import re

# A line: address, whether a loop begins, and instructions that start together.
_BUNDLE = re.compile(r"\s*(?:0x)?[0-9a-f]+\s+(?:(L[HBE]|P[BF]|CT)\s*)?:\s*>*\s*\{")
_EXIT_TEST = re.compile(
    r"(%p\w+) = scmp\.ge\.s32\.totalorder (?:\([^)]*\), )?%s\w+, (\d+) /\* loop exit test"
)
_JUMP_BACK = re.compile(r"sbr\.rel \(!(%p\w+)\)")
# A jump takes effect after so many more.
_DELAY = 3
# The loop over the steps goes on for two more, in which nothing but the last results are stored.
_NO_STEPS = 2


def cycles_of_kernel(text: str) -> int:
    """Counts the cycles of a kernel whose loops go round a number of times that is known.

    One for each bundle of instructions; what a step loads and stores goes on meanwhile. What only
    some steps do is counted for all.

    Args:
        text: the final bundles, as the TPU's compiler writes them with
            `--xla_jf_dump_llo_text=true` in the environment variable `LIBTPU_INIT_ARGS`.

    Raises:
        ValueError: the text has no bundles, or a loop of unknown length.
    """
    bundles = [bundle for bundle in map(_BUNDLE.match, text.splitlines()) if bundle]
    if not bundles:
        raise ValueError(f"text must be that of a kernel's final bundles, got {text[:60]!r}...")
    rounds = {name: int(number) for name, number in _EXIT_TEST.findall(text)}
    times = [1] * len(bundles)
    begun: list[int] = []
    for index, bundle in enumerate(bundles):
        if bundle[1] == "LB":
            begun.append(index)
        jump = _JUMP_BACK.search(bundle.string)
        if jump and jump[1] in rounds:
            first, number = begun.pop(), rounds[jump[1]]
            if not begun:
                number -= _NO_STEPS
            for inside in range(first, min(index + _DELAY + 1, len(bundles))):
                times[inside] *= number
    if begun:
        raise ValueError(f"How often {len(begun)} of the kernel's loops go round is not known.")
    return sum(times)
