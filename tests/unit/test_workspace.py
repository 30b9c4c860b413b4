"""The output folder: continued, refused, or started over, and never somebody else's."""

import errno
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError

from qrealign.errors import ConfigError, QrealignError, ResumeError
from qrealign.files import read_json, write_aside, write_json, write_tensors, write_text
from qrealign.pipeline import main
from qrealign.pipeline.workspace import Workspace
from qrealign.resources import ResourceMeter, host_bytes

IDENTITY = {"scheme": "w8a8", "settings": {"steps": 80}}


def write_packed(directory):
    """Write as much of a packed checkpoint as tells it from anybody else's."""
    write_json(directory / "config.json", {"quantization_config": {"qrealign": {"run": "key"}}})


def test_a_run_is_continued_only_by_its_like(tmp_path):
    assert not Workspace(tmp_path / "o").open(IDENTITY, fresh=False, must_exist=False)
    assert Workspace(tmp_path / "o").open(IDENTITY, fresh=False, must_exist=True)
    with pytest.raises(ResumeError, match=r"settings\.steps: 80 -> 40"):
        Workspace(tmp_path / "o").open({"scheme": "w8a8", "settings": {"steps": 40}}, fresh=False, must_exist=False)
    assert not Workspace(tmp_path / "o").open({"scheme": "w4a16"}, fresh=True, must_exist=False)


def test_resume_without_a_run(tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        Workspace(tmp_path / "o").open(IDENTITY, fresh=False, must_exist=True)


def test_foreign_folders_are_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for fresh in (False, True):
        with pytest.raises(ConfigError, match=r"thesis\.tex"):
            Workspace(tmp_path).open(IDENTITY, fresh=fresh, must_exist=False)
    assert (tmp_path / "thesis.tex").read_text() == "mine"
    with pytest.raises(ConfigError, match="is a file"):
        Workspace(tmp_path / "thesis.tex").open(IDENTITY, fresh=False, must_exist=False)


def test_folders_that_cannot_be_used_are_refused(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"cannot be made, because .*notes\.txt is a file"):
        Workspace(tmp_path / "notes.txt" / "deep" / "er").open(IDENTITY, fresh=False, must_exist=False)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ConfigError, match="cannot be written to"):
        Workspace(tmp_path / "new" / "deep").open(IDENTITY, fresh=False, must_exist=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_fresh_removes_only_what_the_project_writes(tmp_path):
    workspace = Workspace(tmp_path / "o")
    workspace.open(IDENTITY, fresh=False, must_exist=False)
    write_packed(workspace.model)
    write_text(workspace.directory / "report.json", "{}")
    write_text(workspace.state / "analysis.json", "{}")
    assert workspace.open(IDENTITY, fresh=False, must_exist=False) and workspace.model.exists()
    assert not workspace.open(IDENTITY, fresh=True, must_exist=False)
    assert sorted(path.name for path in workspace.directory.iterdir()) == ["state"]
    assert [path.name for path in workspace.state.iterdir()] == ["run.json"]


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("mine", ["model/model.safetensors", "state/notes.txt", "state", "report.md"])
def test_foreign_things_under_our_names_are_refused_and_left_alone(tmp_path, mine, fresh):
    write_text(tmp_path / mine, "mine")
    for action in ("check", "open"):
        with pytest.raises(ConfigError, match=mine.split("/")[0]):
            getattr(Workspace(tmp_path), action)(IDENTITY, fresh=fresh, must_exist=False)
    assert (tmp_path / mine).read_text() == "mine"


def test_a_checkpoint_of_ours_may_be_replaced_though_its_state_is_gone(tmp_path):
    write_packed(tmp_path / "model")
    write_text(tmp_path / "report.md", "ours")
    assert not Workspace(tmp_path).open(IDENTITY, fresh=False, must_exist=False)


@pytest.mark.parametrize("fresh", [False, True])
def test_inputs_that_the_run_would_replace_are_refused(tmp_path, fresh):
    workspace = Workspace(tmp_path / "o")
    workspace.open(IDENTITY, fresh=False, must_exist=False)
    write_packed(workspace.model)
    probe = workspace.state / "probes" / "probes.safetensors"
    write_text(probe, "probe")
    for path in (probe, workspace.model):
        with pytest.raises(ConfigError, match="is to be read"):
            Workspace(tmp_path / "o", inputs=[path]).open(IDENTITY, fresh=fresh, must_exist=False)
    assert probe.exists() and workspace.model.exists()
    elsewhere = [tmp_path / "elsewhere", tmp_path / "o" / "model" / "no-such-file"]
    assert Workspace(tmp_path / "o", inputs=elsewhere).open(IDENTITY, fresh=False, must_exist=False)


def test_a_check_writes_nothing(tmp_path):
    assert not Workspace(tmp_path / "o").check(IDENTITY, fresh=False, must_exist=False)
    assert not list(tmp_path.iterdir())
    Workspace(tmp_path / "o").open(IDENTITY, fresh=False, must_exist=False)
    with pytest.raises(ResumeError):
        Workspace(tmp_path / "o").check({"scheme": "w4a16"}, fresh=False, must_exist=False)
    assert not Workspace(tmp_path / "o").check({"scheme": "w4a16"}, fresh=True, must_exist=False)
    assert Workspace(tmp_path / "o").check(IDENTITY, fresh=False, must_exist=True)


def test_what_killed_processes_left_half_written_is_removed(tmp_path):
    workspace = Workspace(tmp_path / "o")
    write_text(workspace.state / ".run.json.7.part", "killed before the run had a name")
    workspace.open(IDENTITY, fresh=False, must_exist=False)
    write_text(workspace.state / "repair" / ".block.safetensors.7.part", "half")
    write_text(workspace.directory / ".report.md.7.part", "half")
    write_text(workspace.directory / ".model.discarded" / "config.json", "half gone")
    assert workspace.open(IDENTITY, fresh=False, must_exist=False)
    left = {path.relative_to(tmp_path / "o").as_posix() for path in workspace.directory.rglob("*")}
    assert left == {"state", "state/run.json", "state/repair"}


def test_tensors_may_be_read_by_whom_other_files_may(tmp_path):
    write_text(tmp_path / "a.json", "{}")
    write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "a.json").stat().st_mode


def test_stages_are_measured_once(tmp_path):
    workspace, meter = Workspace(tmp_path / "o"), ResourceMeter()
    workspace.open(IDENTITY, fresh=False, must_exist=False)
    with pytest.raises(RuntimeError), workspace.stage("probe", meter):
        raise RuntimeError("killed")
    assert not workspace.done("probe")
    with workspace.stage("probe", meter):
        sum(range(1000))
    assert workspace.done("probe")
    first = workspace.stages(["probe", "pack"])
    with workspace.once("probe", meter):
        pass
    assert workspace.stages(["probe"]) == first and first[0].wall_seconds > 0 and first[0].gpu_hours == 0
    assert first[0].peak_host_bytes >= 0.5 * host_bytes() > 0


def test_calibration_is_done_only_with_its_record(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    for name, value in (("run_calibration", lambda *_: []), ("_writer", lambda _: None), ("write_json", killed)):
        monkeypatch.setattr(main, name, value)
    spec = SimpleNamespace(polish=None, learns_behind_blocks=False)
    context = SimpleNamespace(workspace=Workspace(tmp_path), spec=spec, meter=ResourceMeter())
    with pytest.raises(KeyboardInterrupt):
        main.calibrate(context, None)
    assert not context.workspace.done("calibrate")


def test_cached_values_are_computed_once(tmp_path):
    workspace = Workspace(tmp_path / "o")
    workspace.open(IDENTITY, fresh=False, must_exist=False)
    calls = []
    for _ in range(2):
        assert workspace.cached_json("x", lambda: calls.append(1) or {"a": 1}) == {"a": 1}
    assert len(calls) == 1


def test_files_are_whole_or_absent(tmp_path):
    write_json(tmp_path / "a.json", {"old": 1})
    with pytest.raises(RuntimeError), write_aside(tmp_path / "a.json") as aside:
        aside.write_text("half")
        raise RuntimeError("killed")
    assert read_json(tmp_path / "a.json") == {"old": 1} and [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_folders_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    def write(text):
        with write_aside(tmp_path / "model") as aside:
            aside.mkdir()
            (aside / "weights").write_text(text)

    write("one")
    write("two")
    assert (tmp_path / "model" / "weights").read_text() == "two"
    rename, calls = os.replace, []

    def fail_second(origin, target):
        calls.append(origin)
        if len(calls) == 2:
            raise OSError(errno.EIO, "broken")
        rename(origin, target)

    monkeypatch.setattr(os, "replace", fail_second)
    with pytest.raises(OSError, match="broken"):
        write("three")
    assert (tmp_path / "model" / "weights").read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        SafetensorError('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space" })'),
    ],
)
def test_a_full_disk_is_one_sentence(tmp_path, error):
    with pytest.raises(QrealignError, match="the disk is full"), write_aside(tmp_path / "a"):
        raise error
    assert not list(tmp_path.iterdir())


def test_other_errors_of_writing_stay_what_they_are(tmp_path):
    for error in (OSError(errno.EACCES, "denied"), SafetensorError("bad header (os error 280)")):
        with pytest.raises(type(error), match=r"denied|bad header"), write_aside(tmp_path / "a"):
            raise error
