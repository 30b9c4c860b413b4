"""Who may import whom: the table below is the rule, and every import of the project is checked against it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOUNDATION = {"arch", "config", "errors", "files", "intervals", "ranges", "records", "resources", "status"}

# A room may import itself and the rooms named; `room.module` allows that module alone.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "arch": {"config", "errors"},
    "files": {"errors"},
    "intervals": set(),
    "ranges": {"errors"},
    "records": {"config", "errors"},
    "resources": {"errors", "records"},
    "status": {"errors", "qrealign_kernels"},
    "models": FOUNDATION,
    "data": FOUNDATION,
    "judges": FOUNDATION | {"data", "models"},
    "quant": FOUNDATION | {"qrealign_kernels"},
    "probes": FOUNDATION | {"data", "judges"},
    "evaluate": FOUNDATION | {"data", "judges"},
    "calibrate": FOUNDATION | {"data", "judges", "models", "probes.probe", "quant"},
    "repair": FOUNDATION | {"data", "models"},
    "pack": FOUNDATION | {"models", "quant", "qrealign_kernels"},
    "deploy": FOUNDATION | {"data.generate", "models", "pack", "qrealign_kernels"},
    "report": FOUNDATION,
    "demo": FOUNDATION | {"data", "evaluate", "judges", "models", "quant"},
    "pipeline": FOUNDATION
    | {
        "calibrate",
        "data",
        "demo",
        "deploy",
        "evaluate",
        "judges",
        "models",
        "pack",
        "probes",
        "qrealign_kernels",
        "quant",
        "repair",
        "report",
    },
    "assess": FOUNDATION | {"data", "demo", "evaluate", "judges", "models", "pack.source", "pipeline.models", "report"},
    "serve": FOUNDATION | {"data", "deploy", "models", "pack.source", "report.theme"},
    "evaluate.__main__": {"assess.main"},
    "cli": FOUNDATION | {"calibrate.methods", "pipeline.methods", "pipeline.options", "repair.settings"},
    "doctor": {"qrealign_kernels"},
    "run": FOUNDATION | {"cli", "doctor", "pipeline.main", "report"},
}
# Packages that a room never imports, not even inside a function.
HEAVY = {"accelerate", "compressed_tensors", "datasets", "matplotlib", "peft", "sklearn", "transformers"}
FORBIDDEN: dict[str, set[str]] = {
    **dict.fromkeys(FOUNDATION, HEAVY),
    "judges": HEAVY | {"numpy", "torch"},  # but for the files named in EXEMPT
    "report": HEAVY | {"torch"},
    "cli": HEAVY | {"torch"},
}
# Files whose whole purpose is such a package; nothing of their room imports them at the top (see the last test).
EXEMPT: dict[str, set[str]] = {
    "judges/model.py": {"torch", "transformers"},
    "judges/classifier.py": {"numpy", "sklearn"},
    "judges/train.py": {"numpy", "sklearn"},
}
# The rules of `judges` are used everywhere, by processes that hold no model: they import nothing but each other.
RULES = ("degeneracy", "interface", "refusal", "text")
# Packages that a few rooms alone import.
ONLY_IN = {
    "datasets": {"data"},
    "fastapi": {"serve"},
    "lm_eval": {"evaluate"},
    "prometheus_client": {"serve"},
    "pydantic": {"serve"},
    "sklearn": {"judges", "probes"},
    "starlette": {"serve"},
    "uvicorn": {"serve"},
}


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and full name of each module that a file imports, at the top or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = {"qrealign", "qrealign_kernels"}
            whole = node.module in names  # `from qrealign import probes` names a room, not an attribute
            yield from (
                (node.lineno, f"{node.module}.{alias.name}" if whole else str(node.module)) for alias in node.names
            )


def room_of(path: Path) -> str:
    """Return the room of a file of `qrealign`; the table may list a single file, such as an entry point."""
    parts = path.relative_to(ROOT / "qrealign").with_suffix("").parts
    return name if (name := ".".join(parts)) in ALLOWED else parts[0]


def rooms() -> list[str]:
    """Return the rooms that hold code."""
    return sorted({room_of(path) for path in (ROOT / "qrealign").rglob("*.py")} - {"__init__"})


def may_import(room: str, module: str) -> bool:
    """Tell whether a room may import a module, given by its full name."""
    package, *rest = module.split(".")
    if package == "qrealign_kernels":
        return package in ALLOWED[room]
    if package != "qrealign" or not rest:
        return True
    target = rest[0]
    if target not in ALLOWED:
        return True  # a name of qrealign/__init__.py itself, such as its version
    return target == room or target in ALLOWED[room] or ".".join(rest[:2]) in ALLOWED[room]


@pytest.mark.parametrize("room", rooms())
def test_room_imports_only_what_the_table_allows(room: str) -> None:
    assert room in ALLOWED, f"add {room} to the table"
    wrong = []
    for path in (ROOT / "qrealign").rglob("*.py"):
        if room_of(path) != room:
            continue
        for line, module in imported_modules(path):
            package = module.split(".")[0]
            elsewhere = package in ONLY_IN and room not in ONLY_IN[package]
            exempt = EXEMPT.get(path.relative_to(ROOT / "qrealign").as_posix(), set())
            if elsewhere or package in FORBIDDEN.get(room, set()) - exempt or not may_import(room, module):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", RULES)
def test_rules_import_nothing_but_each_other(name: str) -> None:
    path = ROOT / "qrealign" / "judges" / f"{name}.py"
    modules = [module for _, module in imported_modules(path) if module.startswith("qrealign")]
    assert {module.removeprefix("qrealign.judges.") for module in modules} <= set(RULES)


def test_no_judge_is_loaded_before_it_is_asked_for() -> None:
    code = (
        "import sys, qrealign.judges.resolve, qrealign.judges.agreement as a; "
        "qrealign.judges.resolve.open_judge('refusal-rule').harmful(['x'], ['y']); "
        "print(*sorted({'torch', 'transformers', 'sklearn', 'numpy', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_table_has_no_cycle() -> None:
    done: set[str] = set()
    while len(done) < len(ALLOWED):
        ready = {
            room
            for room, targets in ALLOWED.items()
            if room not in done
            and all(target.split(".")[0] in done | {room} for target in targets - {"qrealign_kernels"})
        }
        assert ready, f"these rooms import each other: {sorted(set(ALLOWED) - done)}"
        done |= ready


def test_kernels_know_nothing_of_models() -> None:
    allowed = {"qrealign_kernels", "torch", "triton"}
    for path in (ROOT / "kernels").rglob("*.py"):
        third_party = {module.split(".")[0] for _, module in imported_modules(path)} & (HEAVY | {"qrealign", "numpy"})
        assert not third_party - allowed, path


def test_nothing_that_is_installed_knows_the_benchmarks() -> None:
    for folder in ("qrealign", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            known = {name.split(".")[0] for _, name in imported_modules(path)}
            assert not known & {"benchmarks", "tests"}, path


def test_workers_of_the_benchmark_start_without_torch() -> None:
    """A worker's environment must stand before torch is imported, so what starts it imports none at its top."""
    for name in ("__init__", "__main__", "workers"):
        tree = ast.parse((ROOT / "benchmarks" / "safety" / f"{name}.py").read_text(encoding="utf-8"))
        tops = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {getattr(node, "module", None) or node.names[0].name for node in tops}
        assert not {module.split(".")[0] for module in modules} & (HEAVY | {"torch"}), name
        assert not {module for module in modules if module.startswith("benchmarks.") or module == "qrealign.models"}


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_native_code_knows_nothing_of_torch() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        text = path.read_text(encoding="utf-8")
        assert "torch/" not in text, path
        assert path.name == "bindings.cpp" or "pybind11" not in text, path


def test_files_stay_readable() -> None:
    too_long = [
        str(path.relative_to(ROOT))
        for folder in ("qrealign", "kernels", "csrc", "benchmarks", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
        and len(path.read_text(encoding="utf-8").splitlines()) > 600
    ]
    assert not too_long
