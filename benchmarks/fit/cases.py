"""What a kernel needs to be compiled without data: a `Case` a kernel and variant, listed by the modules in `PARTS`."""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import triton

from qrealign_kernels import launches

PARTS = (
    "benchmarks.fit.calibration",
    "benchmarks.fit.products",
    "benchmarks.fit.blocks",
)  # each has CASES, a tuple of `Case`
OPTIONS = ("num_warps", "num_stages")  # of a launch choice; all else but HOST is a constexpr argument
HOST = ("PROGRAMS", "TOKENS", "COLUMNS")  # of a launch choice; read by the launching code alone


def no_constants(key: str) -> dict[str, int]:
    """Return nothing: the key of the launch table sets no constexpr argument."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel with the types and constants of one use; tile sizes, warps and stages come from the launch tables.

    Attributes:
        name: what the table of the documentation calls it; unique.
        kernel: the `@triton.jit` function.
        table: the kernel's name in `launch_tables/*.json`.
        types: argument -> Triton type ("*bf16", "i32"); what is not named is "*fp32" if it ends in `_ptr`, else "i32".
        constants: constexpr argument -> value.
        from_key: constexpr arguments that a key of the table stands for, such as the width of a tile.
        aligned: integer arguments that real layers make multiples of 16; all pointers are.
        keys: of the table's keys these alone; None for all.
        hot: it may not spill registers.
        fp_fusion: the compiler may fuse a multiplication into the addition after it.
    """

    name: str
    kernel: triton.JITFunction
    table: str
    types: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)
    from_key: Callable[[str], dict[str, int]] = no_constants
    aligned: tuple[str, ...] = ()
    keys: tuple[str, ...] | None = None
    hot: bool = True
    fp_fusion: bool = False


@dataclass(frozen=True)
class Build:
    """A case with one launch choice: what is compiled, once per target."""

    case: str
    gpu_class: str
    key: str
    choice: tuple[tuple[str, int], ...]

    def targets(self, targets: Sequence[int]) -> list[int]:
        """Return those of the targets that use this choice: a GPU class's own table serves no other GPU."""
        return [target for target in targets if self.gpu_class in (launches.DEFAULT, f"sm{target}")]


def all_cases() -> dict[str, Case]:
    """Return every case by name."""
    found = [case for part in PARTS for case in importlib.import_module(part).CASES]
    assert len({case.name for case in found}) == len(found), "two cases have the same name"
    return {case.name: case for case in found}


def builds(case: Case) -> Iterator[Build]:
    """Yield every shipped launch choice of a case, those of the class "default" first; equal choices once."""
    seen = set()
    classes = sorted((path.stem for path in launches.TABLES.glob("*.json")), key=lambda name: name != launches.DEFAULT)
    for gpu_class in classes:
        for key, choice in launches.table(gpu_class).get(case.table, {}).items():
            if case.keys is not None and key not in case.keys:
                continue
            build = Build(case.name, gpu_class, key, tuple(sorted(choice.items())))
            identity = (tuple(case.from_key(key).items()), build.choice)
            if identity not in seen:
                seen.add(identity)
                yield build


def jobs(cases: Iterable[Case], targets: Sequence[int]) -> list[tuple[Build, int]]:
    """Return every build of the cases with every target that uses it."""
    return [(build, target) for case in cases for build in builds(case) for target in build.targets(targets)]


def sample(cases: Iterable[Case], targets: Sequence[int]) -> list[tuple[Build, int]]:
    """Return one build of every kernel, the targets in turn, with a choice of the target's own table if any."""
    by_kernel = {case.kernel: case for case in cases}
    turns = zip(by_kernel.values(), itertools.cycle(targets))
    return [([build for build in builds(case) if build.targets([target])][-1], target) for case, target in turns]


def signature(case: Case, constants: Mapping[str, object]) -> dict[str, str]:
    """Return the type of every argument, in the kernel's order."""
    return {
        name: "constexpr" if name in constants else case.types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in inspect.signature(case.kernel.fn).parameters
    }
