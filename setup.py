"""Builds the packages, and the extensions where their compilers allow it: what is absent never fails an install.

QREALIGN_BUILD=off leaves both extensions out, =cpu insists on the C++ one, =cuda on both, =auto (the default) tries the
C++ one and, on a machine with an NVIDIA GPU, the CUDA one for that GPU. =cuda compiles for all GPUs, which takes
minutes. nvcc is found through CUDA_HOME, PATH or /usr/local/cuda. Why one is missing is kept beside the package's
modules for `python -m qrealign.run doctor`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("QREALIGN_BUILD", "auto")
REQUIRED = {"off": (), "auto": (), "cpu": ("_C",), "cuda": ("_C", "_C_cuda")}
PACKAGE = "qrealign_kernels"
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",  # GCC 12's own AVX-512 header sets registers to themselves
    "-pthread",
]
# Compute capabilities to compile for, where nvcc knows them; all have the instructions that the kernels use.
CAPABILITIES = (80, 86, 89, 90, 120)
WITH_OWN_FEATURES = 90  # whose products of whole warp groups later GPUs do not have
PORTABLE = 90  # also as PTX, which drivers translate for the GPUs that come between and after


class OptionalBuildExt(build_ext):
    """Builds the extensions, and notes beside the package's modules what became of each."""

    def run(self) -> None:
        self.notes: dict[str, str] = {}
        if "_C_cuda" in REQUIRED[MODE]:
            find_toolkit()  # says at once what would be missing minutes later
        super().run()
        folder = Path(self.get_ext_fullpath(f"{PACKAGE}._C")).parent  # in the checkout if that is where it goes
        folder.mkdir(parents=True, exist_ok=True)
        for name, note in self.notes.items():
            if note != "built":  # what an earlier build left there is of other sources, or not wanted
                Path(self.get_ext_fullpath(f"{PACKAGE}.{name}")).unlink(missing_ok=True)
        lines = [f"{name}: {note}\n" for name, note in self.notes.items()]
        (folder / "_build_note.txt").write_text("".join(lines), encoding="utf-8")

    def build_extension(self, ext: Extension) -> None:
        name = ext.name.removeprefix(f"{PACKAGE}.")
        try:
            if MODE == "off":
                raise RuntimeError("QREALIGN_BUILD=off")
            if name == "_C_cuda":
                present = CAPABILITIES if MODE == "cuda" else capabilities_here()
                if not present:
                    raise NotAskedForError("no GPU that it is for is here; QREALIGN_BUILD=cuda builds it")
                self.compile_kernels(ext, present)
            import pybind11

            ext.include_dirs.append(pybind11.get_include())
            super().build_extension(ext)
        except Exception as error:
            if name in REQUIRED[MODE]:
                raise
            self.notes[name] = f"left out: {error}".replace("\n", " ")
            if MODE != "off" and not isinstance(error, NotAskedForError):
                print(f"warning: {ext.name} is not built ({error}); other code takes its place", file=sys.stderr)
        else:
            self.notes[name] = "built"

    def compile_kernels(self, ext: Extension, capabilities: tuple[int, ...]) -> None:
        """Compile the .cu files and add them to the extension, with the runtime library inside it."""
        toolkit = find_toolkit()
        nvcc = str(toolkit / "bin" / "nvcc")
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        options = ["-std=c++17", "-O3", "--threads", "0", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        options.append("-diag-suppress=177")  # what one GPU's branch alone uses, while another's is compiled
        options += targets(nvcc, capabilities)
        sources = sorted(Path("csrc/cuda").glob("*.cu"))
        objects = [str(folder / f"{source.stem}.o") for source in sources]
        commands = [
            [nvcc, *options, "-c", str(source), "-o", target] for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.spawn, commands))
        ext.extra_objects += objects
        ext.library_dirs += [str(toolkit / folder) for folder in ("lib64", "lib")]
        ext.libraries += ["cudart_static", "dl", "rt"]


class NotAskedForError(RuntimeError):
    """An extension that is left out unless QREALIGN_BUILD names it: nothing to warn of."""


def find_toolkit() -> Path:
    """Return the folder of the CUDA toolkit."""
    if home := os.environ.get("CUDA_HOME"):
        found = Path(home)
    else:
        nvcc = shutil.which("nvcc")
        found = Path(nvcc).resolve().parents[1] if nvcc else Path("/usr/local/cuda")
    if not (found / "bin" / "nvcc").is_file():
        raise RuntimeError("no CUDA toolkit: CUDA_HOME, PATH and /usr/local/cuda lead to no nvcc")
    return found


def capabilities_here() -> tuple[int, ...]:
    """Return the compute capabilities of this machine's GPUs that the kernels are for."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return ()
    here = {int(line.replace(".", "")) for line in done.stdout.split()}
    return tuple(sorted(here.intersection(CAPABILITIES)))


def targets(nvcc: str, capabilities: tuple[int, ...]) -> list[str]:
    """Return nvcc's options for GPUs."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = [capability for capability in capabilities if f"compute_{capability}" in listed]
    names = [f"{capability}{'a' if capability == WITH_OWN_FEATURES else ''}" for capability in known]
    codes = [f"arch=compute_{name},code=sm_{name}" for name in names]
    if PORTABLE in known:
        codes.append(f"arch=compute_{PORTABLE},code=compute_{PORTABLE}")
    return [option for code in codes for option in ("-gencode", code)]


def extensions() -> list[Extension]:
    """Describe the extensions; they need pybind11 and no torch headers."""
    cpu = Extension(
        f"{PACKAGE}._C",
        ["csrc/bindings.cpp", *sorted(str(path) for path in Path("csrc/cpu").glob("*.cpp"))],
        depends=["csrc/common.h", "csrc/cpu/linear.h"],
        language="c++",
        extra_compile_args=FLAGS,
        extra_link_args=["-pthread"],
        optional="_C" not in REQUIRED[MODE],
    )
    cuda = Extension(
        f"{PACKAGE}._C_cuda",
        ["csrc/cuda/bindings.cpp"],
        depends=[str(path) for path in Path("csrc/cuda").iterdir()],
        language="c++",
        extra_compile_args=FLAGS,
        extra_link_args=["-pthread"],
        optional="_C_cuda" not in REQUIRED[MODE],
    )
    return [cpu, cuda]


if MODE not in REQUIRED:
    raise SystemExit(f"QREALIGN_BUILD must be off, cpu, cuda or auto, got {MODE!r}")

setup(
    packages=find_packages(include=["qrealign", "qrealign.*"]) + find_packages("kernels"),
    package_dir={"qrealign_kernels": "kernels/qrealign_kernels"},
    package_data={
        "qrealign": ["py.typed"],
        "qrealign.demo": ["**/*.safetensors", "**/*.json", "**/*.jsonl", "**/*.gz", "**/*.jinja"],
        "qrealign.report": ["**/*.html", "**/*.css", "**/*.js"],
        "qrealign.serve": ["page/*"],
        "qrealign_kernels": ["py.typed", "launch_tables/*.json"],
    },
    include_package_data=False,
    ext_modules=extensions(),
    cmdclass={"build_ext": OptionalBuildExt},
)
