"""Worker processes: results, failures, a death, and what each process sees of the machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benchmarks.safety.workers import Done, Workers, _variables, attempt
from qrealign.errors import DataError


def work(job: str, device: str) -> None:
    """Do what the job's name says."""
    print("working on", job)
    if job == "bad data":
        raise DataError("the file is empty: give another")
    if job == "bug":
        raise ZeroDivisionError("division\nby zero")
    if job == "death":
        os._exit(9)
    if job.startswith("/"):
        Path(job).write_text(f"{device} {os.environ['OMP_NUM_THREADS']} {os.getpid()} {'torch' in sys.modules}")


def test_each_job_ends_once_and_a_dead_worker_costs_its_job_alone(tmp_path):
    written = [str(tmp_path / name) for name in "abc"]
    with Workers(work, ["cpu"], threads=3, logs=tmp_path / "logs") as workers:
        done = list(workers.run([written[0], "death", written[1], "bad data", "bug"]))
        done += workers.run([written[2]])
        process, _ = workers._running[0]
        process.kill()  # while it waits
        process.join()
        assert [item.error for item in workers.run(["fine"])] == [None]
    assert [item.job for item in done] == [written[0], "death", written[1], "bad data", "bug", written[2]]
    errors = {item.job: item.error for item in done}
    assert errors["bad data"] == "the file is empty: give another"
    assert errors["bug"] == "ZeroDivisionError: division by zero"
    assert "exit code 9" in errors["death"]
    assert all(errors[path] is None for path in written)
    first, second, third = (Path(path).read_text().split() for path in written)
    # The environment stands before torch is imported; the process after the death serves the next round too.
    assert first[:2] == ["cpu", "3"] and first[3] == "False"
    assert second[2] == third[2] != first[2]
    log = (tmp_path / "logs" / "worker-0.log").read_text()
    assert "working on bug" in log and "ZeroDivisionError" in log
    assert "OMP_NUM_THREADS" not in os.environ or os.environ["OMP_NUM_THREADS"] != "3"


class DeadOnArrival:
    """Work whose process ends when it unpickles it, before it reads a job."""

    def __reduce__(self):
        return os._exit, (7,)


def test_a_worker_that_dies_before_it_reads_its_job_costs_that_job_alone(tmp_path):
    with Workers(DeadOnArrival(), ["cpu"], threads=1, logs=tmp_path) as workers:
        errors = [item.error for item in workers.run(["one", "two"])]
    assert len(errors) == 2 and all("exit code 7" in error for error in errors)


def test_a_worker_that_dies_behind_its_last_job_costs_nothing(tmp_path):
    with Workers(work, ["cpu"], threads=1, logs=tmp_path) as workers:
        assert [item.error for item in workers.run(["fine"])] == [None]
        process, _ = workers._running[0]
        process.kill()
        process.join()


def test_jobs_are_spread_over_workers_and_an_error_outside_stops_them(tmp_path):
    with pytest.raises(KeyboardInterrupt), Workers(work, ["cpu", "cpu"], threads=1, logs=tmp_path) as workers:
        for number, _ in enumerate(workers.run([str(tmp_path / name) for name in "abcd"])):
            processes = [process for process, _ in workers._running.values()]
            if number == 1:
                raise KeyboardInterrupt
    assert len(processes) == 2 and not any(process.is_alive() for process in processes)


@pytest.mark.parametrize(
    ("visible", "device", "seen"),
    [(None, "cuda:1", "1"), ("4,6", "cuda:1", "6"), ("4", "cuda", "4"), ("", "cuda:2", "2")],
)
def test_a_gpu_worker_sees_its_gpu_alone(monkeypatch, visible, device, seen):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _variables(device, 2)["CUDA_VISIBLE_DEVICES"] == seen
    assert "CUDA_VISIBLE_DEVICES" not in _variables("cpu", 2)


def test_an_attempt_in_this_process(capsys):
    assert attempt(work, "fine", "cpu") is None
    assert attempt(work, "bug", "cpu") == "ZeroDivisionError: division by zero"
    assert "Traceback" in capsys.readouterr().err
    assert Done("fine", None).error is None
