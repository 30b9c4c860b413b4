"""`python -m qrealign.run doctor`: what was built, what this machine can use, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import platform

PACKAGES = ("torch", "triton", "transformers", "compressed-tensors", "accelerate", "safetensors")


def report() -> str:
    """Return the lines that `doctor` prints."""
    import torch

    import qrealign_kernels

    info = qrealign_kernels.build_info()
    sections = {
        "versions": {"python": platform.python_version(), "qrealign": _version("qrealign")}
        | {name: _version(name) for name in PACKAGES},
        "devices": {"cpu": f"{torch.get_num_threads()} threads"}
        | {f"cuda:{index}": _describe(index) for index in range(torch.cuda.device_count())},
        "kernels": {
            "triton": info["triton"],
            "cuda extension": info["cuda_kernels"],
            "cpu": info["cpu"],
            "reference": info["reference"],
        },
        "instruction sets": {"fake quantization": info["cpu_isa"], "packed linears": info["cpu_linear_isa"]},
    }
    lines = []
    for title, rows in sections.items():
        width = max(map(len, rows))
        lines += [title, *(f"  {name:<{width}}  {value}" for name, value in rows.items())]
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _describe(index: int) -> str:
    """Return a GPU's name, memory, compute capability and the launch table that serves it."""
    import torch

    from qrealign_kernels import launches

    properties = torch.cuda.get_device_properties(index)
    gibibytes = properties.total_memory / 2**30
    capability = f"compute capability {properties.major}.{properties.minor}"
    return f"{properties.name}, {gibibytes:.0f} GiB, {capability}, launch table {launches.gpu_class(index)!r}"
