"""What a kernel needs to be compiled without data: a `Case` a kernel and variant, listed by the modules in `PARTS`."""

from __future__ import annotations

import importlib
import inspect
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
HOST = ("PROGRAMS", "TOKENS")  # of a launch choice; read by the launching code alone


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


def sample(cases: Iterable[Case]) -> list[tuple[Build, int]]:
    """Return what a test compiles of all builds and targets, which take minutes on two cores.

    Every case with every default choice for compute capability 8.9, which has the least shared memory and is what
    users have; of every kernel one choice for each other target, its own class's where a table has one. The rest is
    compiled by `python -m benchmarks.fit`. 8.6 is left to it too: the compiler treats it as 8.9.
    """
    chosen: dict[tuple[Build, int], None] = {}
    once: set[tuple[object, int]] = set()
    for case in cases:
        found = list(builds(case))
        assert found, f"no launch table has a choice for {case.table}"
        chosen |= {(build, 89): None for build in found if build.gpu_class == launches.DEFAULT}
        for target in (80, 90, 120):
            ours = [build for build in found if build.gpu_class in (launches.DEFAULT, f"sm{target}")]
            if (case.kernel, target) not in once:
                once.add((case.kernel, target))
                chosen[ours[-1], target] = None
    return list(chosen)


def signature(case: Case, constants: Mapping[str, object]) -> dict[str, str]:
    """Return the type of every argument, in the kernel's order."""
    return {
        name: "constexpr" if name in constants else case.types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in inspect.signature(case.kernel.fn).parameters
    }
