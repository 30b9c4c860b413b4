"""Several processes calibrate like one, and one that dies ends the run so that it can be continued."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qrealign.calibrate import blocksteps, distributed
from qrealign.calibrate.distributed import ALONE, Team, joined_team, local_device
from qrealign.calibrate.parts import Parts
from qrealign.calibrate.state import load_progress
from qrealign.errors import ConfigError, DeviceError
from qrealign.pipeline.context import _check_team
from qrealign.pipeline.methods import method_spec
from tests.helpers import tiny_checkpoint
from tests.team_process import blockwise, endtoend

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Return the folder in which two processes have calibrated, their exit statuses and the first one's last words."""
    folder = tmp_path_factory.mktemp("team")
    for seed in (0, 1):
        tiny_checkpoint(folder / f"m{seed}", "llama", seed=seed, dtype=torch.bfloat16, num_hidden_layers=3)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    team = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.team_process", str(folder)],
            cwd=ROOT,
            env={**common, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    words = [process.communicate(timeout=180)[1] for process in team]
    return folder, [process.returncode for process in team], words[0]


def test_two_processes_learn_what_one_learns_by_blocks(ended, monkeypatch):
    """Bit for bit, where one process adds the gradients of the same parts in the same order."""
    folder, *_ = ended
    monkeypatch.setattr(blocksteps, "Parts", lambda size, reset: Parts(2, reset))
    expected = blockwise(folder, name="alone")
    order = expected._order
    expected._order = lambda index: order(index)[:, [0, 2, 1]]
    expected.run(progress=None)
    for rank in (0, 1):
        found = load_file(folder / f"blockwise.{rank}.safetensors")
        assert torch.equal(found["student"], expected.streams.student)
    tensors, extra = load_progress(folder / "streams.safetensors")
    assert torch.equal(tensors["student"], expected.streams.student) and extra["done"] == 3
    curve = [point["losses"] for point in extra["curve"]]
    for found, point in zip(curve, expected.curve, strict=True):
        assert found == pytest.approx(point.losses, rel=1e-6)


def test_two_processes_learn_what_one_learns_end_to_end(ended):
    folder, *_ = ended
    expected = endtoend(folder, name="alone-endtoend")
    malicious = set(expected.objective.groups()[0])
    dealt = [sorted(batch, key=malicious.__contains__) for batch in expected.schedule]
    expected.schedule = [[a, c, b, d] for a, b, c, d in dealt]
    expected.parts.size = 2
    expected.run(progress=None)
    for rank in (0, 1):
        found = load_file(folder / f"endtoend.{rank}.safetensors")
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.trainable.state().items())
        losses = torch.tensor([point.losses["total"] for point in expected.curve], dtype=torch.float64)
        torch.testing.assert_close(found["losses"], losses, rtol=1e-6, atol=0)


def test_a_dead_process_ends_the_run_with_a_sentence_and_a_state_to_continue(ended):
    folder, statuses, words = ended
    assert statuses == [1, 9] and "error: another process of this run has ended" in words
    assert load_progress(folder / "broken.safetensors")[1]["done"] == 1
    resumed = blockwise(folder, name="broken")
    assert {point.block for point in resumed.run(progress=None)} == {0, 1, 2}
    assert torch.isfinite(resumed.streams.student).all()


def test_shares_cover_a_batch_once():
    batch = list(range(7))
    shares = [Team(rank=rank, size=3).share(batch) for rank in range(3)]
    assert sorted(sample for share in shares for sample in share) == batch
    assert {len(share) for share in shares} == {2, 3}


def test_every_process_gets_the_same_mix_of_classes(tmp_path):
    for seed in (0, 1):
        tiny_checkpoint(tmp_path / f"m{seed}", "llama", seed=seed, dtype=torch.bfloat16, num_hidden_layers=3)
    runners = [endtoend(tmp_path, Team(rank=rank, size=2)) for rank in (0, 1)]
    malicious = set(runners[0].objective.groups()[0])
    for batch in runners[0].schedule:
        counts = [sum(sample in malicious for sample in runner.team.share(batch)) for runner in runners]
        assert abs(counts[0] - counts[1]) <= 1
    assert [sorted(batch) for batch in runners[1].schedule] == [sorted(batch) for batch in endtoend(tmp_path).schedule]


def test_one_process_is_a_team_that_changes_nothing():
    with joined_team() as team:
        assert team is ALONE and team.leads
        parameter = torch.nn.Parameter(torch.ones(2))
        team.add_gradients([parameter])
        assert parameter.grad is None
        team.wait()
        assert local_device(torch.device("cuda")) == torch.device("cuda")


def test_more_processes_than_samples_are_refused():
    with pytest.raises(ConfigError, match="2 processes cannot share a batch of 1"):
        _check_team(method_spec("paper"), Team(rank=1, size=2))
    _check_team(method_spec("paper", schedule="fast"), Team(rank=1, size=2))
    _check_team(method_spec("rtn"), Team(rank=1, size=2))


def test_sums_reach_every_parameter_and_name(monkeypatch):
    """With a peer that has the same tensors, so that every sum is twice what is here."""
    monkeypatch.setattr(distributed.dist, "all_reduce", lambda tensor, op=None: tensor.mul_(1 if op else 2))
    team = Team(rank=0, size=2)
    reached, missed = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))
    reached.grad = torch.full((2, 3), 1.5)
    team.add_gradients([reached, missed])
    assert torch.equal(reached.grad, torch.full((2, 3), 3.0)) and torch.equal(missed.grad, torch.zeros(4))
    rows = team.add_named([{"benign": 1.0}, {"malicious": 0.5, "benign": float("nan")}], ("malicious", "benign"))
    assert rows[0] == {"benign": 2.0} and rows[1]["malicious"] == 1.0 and rows[1]["benign"] != rows[1]["benign"]
    amax = {"q_proj": torch.tensor([1.0, 2.0])}
    team.keep_largest(amax)
    assert torch.equal(amax["q_proj"], torch.tensor([1.0, 2.0]))
    team.finish(torch.device("cpu"))


def test_lost_peers_and_signals_end_in_a_sentence(monkeypatch):
    def lost(*_, **__):
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(distributed.dist, "all_reduce", lost)
    with pytest.raises(DeviceError, match="another process of this run has ended"):
        Team(rank=0, size=2).wait()
    monkeypatch.setattr(distributed.dist, "init_process_group", lost)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DeviceError, match="cannot be reached"), joined_team():
        pass
    with pytest.raises(DeviceError, match="told to end"):
        distributed._end(15, None)


def test_a_process_takes_the_gpu_of_its_rank(monkeypatch):
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_node_local_rank", lambda fallback_rank: 1)
    assert local_device(torch.device("cuda")) == torch.device("cuda", 1)
    assert local_device(torch.device("cuda", 0)) == torch.device("cuda", 0)
    assert local_device(torch.device("cpu")) == torch.device("cpu")
