"""The output folder: continued, refused, or started over, and never somebody else's."""

import pytest

from qrealign.errors import ConfigError, QrealignError, ResumeError
from qrealign.files import read_json, write_aside, write_json, write_text
from qrealign.pipeline.workspace import Workspace
from qrealign.resources import ResourceMeter, host_bytes

IDENTITY = {"scheme": "w8a8", "settings": {"steps": 80}}


def test_a_run_is_continued_only_by_its_like(tmp_path):
    assert not Workspace(tmp_path / "o").open(IDENTITY, fresh=False, must_exist=False)
    assert Workspace(tmp_path / "o").open(IDENTITY, fresh=False, must_exist=True)
    with pytest.raises(ResumeError, match="settings.steps: 80 -> 40"):
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


def test_fresh_removes_only_what_the_project_writes(tmp_path):
    workspace = Workspace(tmp_path / "o")
    workspace.open(IDENTITY, fresh=False, must_exist=False)
    (workspace.model).mkdir()
    write_text(workspace.directory / "report.json", "{}")
    workspace.open(IDENTITY, fresh=True, must_exist=False)
    assert sorted(path.name for path in workspace.directory.iterdir()) == ["state"]


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


def test_a_full_disk_is_one_sentence(tmp_path):
    import errno

    with pytest.raises(QrealignError, match="the disk is full"), write_aside(tmp_path / "a"):
        raise OSError(errno.ENOSPC, "No space left on device")
