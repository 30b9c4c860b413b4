"""The output folder: what is where, which stages are done, and whether a run found there may be continued."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qrealign.errors import ConfigError, ResumeError
from qrealign.files import read_json, remove, write_json
from qrealign.pack.size import existing_ancestor
from qrealign.pack.writer import check_replaceable, finished_key
from qrealign.records import StageRecord
from qrealign.resources import ResourceMeter

# In the order of removal: while the state stands, the rest is known as ours.
OWN_NAMES = ("model", "report.json", "report.md", "report.html", "state")


class Workspace:
    """The folder of one run.

    `model/` and `report.*` are the results; `state/` holds what a resumed run needs. A stage that has ended leaves
    `state/<stage>.done.json` with its cost, and is not run again; with `writes` False another process leaves it.
    `inputs` are the files and folders that the run reads: none may lie among what it writes.
    """

    def __init__(self, directory: Path, *, writes: bool = True, inputs: Sequence[Path] = ()) -> None:
        self.directory, self.writes, self.inputs = directory, writes, inputs
        self.state = directory / "state"
        self.model = directory / "model"
        self._marker = self.state / "run.json"

    def check(self, identity: dict[str, Any], *, fresh: bool, must_exist: bool) -> bool:
        """Return whether `open` would continue an earlier run; nothing is changed.

        Raises:
            ConfigError: the folder holds something that is not ours, or an input, or nothing though `must_exist`.
            ResumeError: the folder holds a run with another identity.
        """
        self._refuse_unusable()
        self._refuse_foreign()
        self._refuse_inputs()
        if self._marker.exists() and not fresh:
            self._compare(read_json(self._marker), identity)
            return True
        if must_exist:
            raise ConfigError(f"--resume: {self.directory} holds no run to continue; leave the flag out to start one")
        return False

    def open(self, identity: dict[str, Any], *, fresh: bool, must_exist: bool) -> bool:
        """Prepare the folder for the run described by `identity`; return whether an earlier run is continued.

        Raises:
            QrealignError: as `check`.
        """
        continued = self.check(identity, fresh=fresh, must_exist=must_exist)
        for left_over in [*self.directory.glob(".report.*.part"), *self.state.rglob(".*.part")]:
            remove(left_over)  # half-written by a process that was killed
        for name in OWN_NAMES:
            self._discard(name, whole=fresh)
        if not continued:
            write_json(self._marker, identity)
        return continued

    def _discard(self, name: str, *, whole: bool) -> None:
        """Remove what a killed process left of `name` and, if `whole`, `name` itself.

        It is renamed first: a folder that is half gone could not be told from somebody else's.
        """
        path, aside = self.directory / name, self.directory / f".{name}.discarded"
        remove(aside)
        if whole and path.exists():
            os.replace(path, aside)
            remove(aside)

    def _refuse_unusable(self) -> None:
        """Refuse a folder that cannot be written to."""
        holder = existing_ancestor(self.directory)
        if holder == self.directory.absolute() and not holder.is_dir():
            raise ConfigError(f"--output {self.directory} is a file: name a folder")
        if not holder.is_dir():
            raise ConfigError(f"--output {self.directory} cannot be made, because {holder} is a file: name a folder")
        if not os.access(holder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"--output {self.directory} cannot be written to: name another folder, or change its permissions"
            )

    def _refuse_foreign(self) -> None:
        """Refuse a folder with anything in it that no run of this project wrote, whatever its name."""
        check_replaceable(self.model)
        started = self._marker.exists()
        if not started and self.state.exists() and not _is_blank(self.state):
            raise ConfigError(f"{self.state} belongs to no run of this project: name a new folder with --output")
        ours = OWN_NAMES if started or finished_key(self.model) else ("model", "state")
        foreign = [
            path.name for path in self.directory.glob("*") if path.name not in ours and not path.name.startswith(".")
        ]
        if foreign:
            raise ConfigError(
                f"--output {self.directory} holds something else ({', '.join(sorted(foreign)[:3])}): name a new folder"
            )

    def _refuse_inputs(self) -> None:
        """Refuse what the run reads where the run writes: it would be replaced, with --fresh before it is read."""
        for path in self.inputs:
            for own in (self.directory / name for name in OWN_NAMES):
                if path.exists() and path.resolve().is_relative_to(own.resolve()):
                    raise ConfigError(
                        f"{path} is to be read, but {own} is replaced by the run: move it, or name another --output"
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


def _is_blank(state: Path) -> bool:
    """Return whether a folder holds nothing yet, as where a process was killed before it could name its run."""
    return state.is_dir() and all(path.match(".*.part") for path in state.iterdir())


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
