"""Compiles builds for GPUs that are not there, several at a time, and reads what the machine code takes of them.

The processes are new ones with TRITON_INTERPRET unset: under that variable, which the tests need, a kernel is an
interpreted one from its decoration on and cannot be compiled.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

TARGETS = (80, 86, 89, 90, 120)
SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}  # bytes of a program
# Of a multiprocessor: warps, programs, shared bytes (CUDA C++ programming guide, "Compute Capabilities").
PROCESSOR = {
    80: (64, 32, 164 * 1024),
    86: (48, 16, 100 * 1024),
    89: (48, 24, 100 * 1024),
    90: (64, 32, 228 * 1024),
    120: (48, 24, 100 * 1024),
}
_REGISTERS, _SYSTEM_SHARED = 65536, 1024  # of a multiprocessor; taken by the system from each program's share


@dataclass(frozen=True)
class Fit:
    """What one build takes on one target: registers a thread, bytes of shared memory a program, of spills a thread.

    `triton` is the version that compiled it.
    """

    case: str
    gpu_class: str
    key: str
    target: int
    num_warps: int
    registers: int
    shared_bytes: int
    spilled_bytes: int
    triton: str

    @property
    def occupancy(self) -> float:
        """Share of the multiprocessor's warps that can be resident."""
        warps, programs, shared = PROCESSOR[self.target]
        by_registers = _REGISTERS // (-(-self.registers * 32 // 256) * 256) // self.num_warps  # given out by 256
        by_shared = shared // (self.shared_bytes + _SYSTEM_SHARED)
        return min(programs, by_registers, by_shared, warps // self.num_warps) * self.num_warps / warps


def compile_all(jobs: Sequence[tuple[str, str, str, int]]) -> list[Fit]:
    """Compile (case, GPU class, key, target) each, on all cores; the results in the same order.

    Raises:
        RuntimeError: something did not compile; the compiler's words.
    """
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    workers = min(len(jobs), os.cpu_count() or 1)
    # Files, not pipes: a process whose full pipe nobody reads yet would wait for the others.
    with tempfile.TemporaryDirectory() as folder:
        running = []
        for index in range(workers):
            given, out = Path(folder, f"{index}.jobs"), Path(folder, f"{index}.rows")
            given.write_text(json.dumps(jobs[index::workers]), encoding="utf-8")
            with out.open("w", encoding="utf-8") as stream:
                command = [sys.executable, "-m", "benchmarks.fit.compiling", str(given)]
                running.append(
                    (subprocess.Popen(command, env=env, stdout=stream, stderr=subprocess.PIPE, text=True), out)
                )
        errors = [(process.communicate()[1], process.returncode) for process, _ in running]
        if wrong := [error for error, code in errors if code]:
            raise RuntimeError(wrong[0])
        fits: list[Fit | None] = [None] * len(jobs)
        for index, (_, out) in enumerate(running):
            fits[index::workers] = [Fit(**json.loads(line)) for line in out.read_text(encoding="utf-8").splitlines()]
    return [fit for fit in fits if fit is not None]


def compile_one(case_name: str, gpu_class: str, key: str, target: int) -> Fit:
    """Compile one build in this process."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from benchmarks.fit.cases import HOST, OPTIONS, all_cases, signature
    from qrealign_kernels import launches

    case = all_cases()[case_name]
    choice = launches.table(gpu_class)[case.table][key]
    tiles = {name: value for name, value in choice.items() if name not in (*OPTIONS, *HOST)}
    constants = {**case.constants, **case.from_key(key), **tiles}
    types = signature(case, constants)
    position = {name: (index,) for index, name in enumerate(types)}
    aligned = [name for name in types if name in case.aligned or types[name].startswith("*")]
    source = ASTSource(
        case.kernel,
        types,
        {position[name]: value for name, value in constants.items()},
        {position[name]: [["tt.divisibility", 16]] for name in aligned},
    )
    options = {name: value for name, value in choice.items() if name in OPTIONS}
    try:
        compiled = triton.compile(
            source, target=GPUTarget("cuda", target, 32), options=options | {"enable_fp_fusion": case.fp_fusion}
        )
    except Exception as error:
        raise RuntimeError(f"{case_name} with {gpu_class}/{key} = {choice} does not compile for sm_{target}") from error
    registers, spilled = _resources(compiled.asm["cubin"])
    warps = compiled.metadata.num_warps
    return Fit(
        case_name, gpu_class, key, target, warps, registers, compiled.metadata.shared, spilled, triton.__version__
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return registers and bytes of stack a thread: a kernel without a stack of its own has one for spills alone."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def _main(jobs: Iterable[Sequence]) -> None:
    for job in jobs:
        print(json.dumps(asdict(compile_one(*job))), flush=True)


if __name__ == "__main__":
    _main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
