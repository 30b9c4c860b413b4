"""The output folder: what is where, which stages are done, and whether a run found there may be continued."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qrealign.errors import ConfigError, ResumeError
from qrealign.files import read_json, remove, write_json
from qrealign.pack.size import existing_ancestor
from qrealign.records import StageRecord
from qrealign.resources import ResourceMeter

OWN_NAMES = ("model", "report.json", "report.md", "report.html", "state")


class Workspace:
    """The folder of one run.

    `model/` and `report.*` are the results; `state/` holds what a resumed run needs. A stage that has ended leaves
    `state/<stage>.done.json` with its cost, and is not run again; with `writes` False another process leaves it.
    """

    def __init__(self, directory: Path, *, writes: bool = True) -> None:
        self.directory, self.writes = directory, writes
        self.state = directory / "state"
        self.model = directory / "model"

    def open(self, identity: dict[str, Any], *, fresh: bool, must_exist: bool) -> bool:
        """Prepare the folder for the run described by `identity`; return whether an earlier run is continued.

        Raises:
            ConfigError: the folder holds something that is not ours, or nothing though `must_exist`.
            ResumeError: the folder holds a run with another identity.
        """
        self._refuse_foreign()
        if fresh:
            for name in OWN_NAMES:
                remove(self.directory / name)
        marker = self.state / "run.json"
        if marker.exists():
            self._compare(read_json(marker), identity)
            return True
        if must_exist:
            raise ConfigError(f"--resume: {self.directory} holds no run to continue; leave the flag out to start one")
        remove(self.state)
        write_json(marker, identity)
        return False

    def _refuse_foreign(self) -> None:
        holder = existing_ancestor(self.directory)
        if holder == self.directory.absolute() and not holder.is_dir():
            raise ConfigError(f"--output {self.directory} is a file: name a folder")
        if not holder.is_dir():
            raise ConfigError(f"--output {self.directory} cannot be made, because {holder} is a file: name a folder")
        if not os.access(holder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"--output {self.directory} cannot be written to: name another folder, or change its permissions"
            )
        foreign = [
            path.name
            for path in self.directory.glob("*")
            if path.name not in OWN_NAMES and not path.name.startswith(".")
        ]
        if foreign:
            raise ConfigError(
                f"--output {self.directory} holds something else ({', '.join(sorted(foreign)[:3])}): name a new folder"
            )

    def _compare(self, old: dict[str, Any], new: dict[str, Any]) -> None:
        old, new = _flatten(old), _flatten(new)
        changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        if changed:
            what = "; ".join(f"{key}: {_short(old.get(key))} -> {_short(new.get(key))}" for key in changed[:4])
            raise ResumeError(
                f"{self.directory} holds another run ({what}): give another --output, or --fresh to start over"
            )

    def done(self, stage: str) -> bool:
        """Return whether the stage has ended."""
        return (self.state / f"{stage}.done.json").exists()

    @contextmanager
    def stage(self, name: str, meter: ResourceMeter) -> Iterator[None]:
        """Measure the stage and mark it done at the end.

        The cost of earlier, killed attempts is not known and not counted.
        """
        with meter.stage(name):
            yield
        if self.writes:
            write_json(self.state / f"{name}.done.json", asdict(meter.stages[-1]))

    @contextmanager
    def once(self, name: str, meter: ResourceMeter) -> Iterator[None]:
        """Measure a stage whose work looks up by itself what is done.

        A later look-up does not change the cost on record.
        """
        if self.done(name):
            yield
            return
        with self.stage(name, meter):
            yield

    def stages(self, names: list[str]) -> list[StageRecord]:
        """Return the costs of the stages that are done, in the order of `names`."""
        return [StageRecord(**read_json(self.state / f"{name}.done.json")) for name in names if self.done(name)]

    def cached_json(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return `state/<name>.json`, computing and writing it first where it is missing."""
        path = self.state / f"{name}.json"
        if not path.exists():
            write_json(path, compute())
        return read_json(path)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:21]}..."
