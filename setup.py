"""Builds the packages, and the C++ extension where a compiler allows it: its absence never fails an install.

QREALIGN_BUILD=off leaves the extension out, =cpu insists on it, =auto (the default) tries.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MODE = os.environ.get("QREALIGN_BUILD", "auto")
NAME = "qrealign_kernels._C"
SOURCES = ["csrc/bindings.cpp", "csrc/cpu/fake_quant_weight.cpp", "csrc/cpu/pack.cpp", "csrc/cpu/per_token.cpp"]


class OptionalBuildExt(build_ext):
    """Builds the extension or notes why it is missing, beside the package's modules."""

    note = "not attempted"

    def run(self) -> None:
        super().run()
        folder = Path(
            self.get_ext_fullpath(NAME)
        ).parent  # beside the extension, in the checkout if that is where it goes
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build_note.txt").write_text(self.note.replace("\n", " ") + "\n", encoding="utf-8")

    def build_extension(self, ext: Extension) -> None:
        try:
            if MODE == "off":
                raise RuntimeError("left out by QREALIGN_BUILD=off")
            import pybind11

            ext.include_dirs.append(pybind11.get_include())
            super().build_extension(ext)
        except Exception as error:
            if MODE == "cpu":
                raise
            self.note = f"left out: {error}"
            print(f"warning: {NAME} is not built ({error}); the PyTorch reference is used instead", file=sys.stderr)
        else:
            self.note = "built"


def extension() -> Extension:
    """Describe the extension; it needs pybind11 and no torch headers."""
    flags = [
        "-std=c++17",
        "-O3",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-pthread",
    ]
    return Extension(
        NAME,
        SOURCES,
        depends=["csrc/common.h"],
        language="c++",
        extra_compile_args=flags,
        extra_link_args=["-pthread"],
        optional=MODE != "cpu",
    )


if MODE not in ("off", "cpu", "auto"):
    raise SystemExit(f"QREALIGN_BUILD must be off, cpu or auto, got {MODE!r}")

setup(
    packages=find_packages(include=["qrealign", "qrealign.*"]) + find_packages("kernels"),
    package_dir={"qrealign_kernels": "kernels/qrealign_kernels"},
    package_data={
        "qrealign": ["py.typed"],
        "qrealign.demo": ["**/*.safetensors", "**/*.json", "**/*.jsonl", "**/*.gz", "**/*.jinja"],
        "qrealign.report": ["**/*.html", "**/*.css", "**/*.js"],
        "qrealign.serve": ["page/*"],
        "qrealign_kernels": ["py.typed", "*.pyi", "launch_tables/*.json"],
    },
    include_package_data=False,
    ext_modules=[extension()],
    cmdclass={"build_ext": OptionalBuildExt},
)
