"""Continuous batching: joining, leaving, failing and ending, without HTTP."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from qrealign.serve.engine import QueueFullError, UnavailableError
from qrealign.serve.jobs import Failure
from qrealign.serve.runner import Runner
from tests.unit.serve_helpers import LENGTH, Desk, read_all, served_model, text_of


class Instrumented(Runner):
    """A runner whose steps can be held up, broken or watched."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.gate = threading.Event()
        self.gate.set()
        self.failing = 0
        self.poison = False
        self.batches: list[int] = []

    def decode(self, tokens, positions):
        self.gate.wait()
        if self.failing:
            self.failing -= 1
            raise RuntimeError("the kernel broke")
        self.batches.append(len(tokens))
        logits = super().decode(tokens, positions)
        if self.poison:
            logits[0] = float("nan")
            self.poison = False
        return logits


@pytest.fixture(scope="module")
def served():
    return served_model()


@pytest.fixture
def runner(served):
    return Instrumented(served.model, slots=3, max_length=LENGTH)


@pytest.fixture
def desk(served, runner):
    desk = Desk(runner, decode=served.decode)
    yield desk
    runner.gate.set()
    desk.close()


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 250, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def wait_until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def is_idle(desk) -> bool:
    load = desk.engine.load()
    return load.running + load.waiting == 0


ASKED = [
    (prompt(30), {"max_tokens": 12}),
    (prompt(5, 1), {"max_tokens": 25, "temperature": 0.9, "seed": 5}),
    (prompt(80, 2), {"max_tokens": 3, "top_logprobs": 2}),
    (prompt(12, 3), {"max_tokens": 9, "temperature": 1.5, "top_p": 0.8, "seed": 6}),
    (prompt(1, 4), {"max_tokens": 30}),
    (prompt(60, 5), {"max_tokens": 17, "temperature": 0.7, "seed": 5}),
]


def test_answers_do_not_depend_on_the_company(desk):
    together = desk.ask(*ASKED)
    alone = [desk.ask(one)[0] for one in ASKED]
    assert [text_of(pieces) for pieces in together] == [text_of(pieces) for pieces in alone]
    assert [pieces[-1].finish for pieces in together] == ["length"] * len(ASKED)
    assert is_idle(desk)
    scores = [[token.logprob for piece in found[2] for token in piece.tokens] for found in (together, alone)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4) and len(scores[0]) == 3


def test_jobs_share_steps(desk, runner):
    desk.ask(*ASKED)
    assert max(runner.batches) == 3
    assert len(runner.batches) < sum(options["max_tokens"] for _, options in ASKED) / 2


def test_long_prompts_are_read_in_pieces_between_steps(desk, runner):
    desk.engine._budget = 16
    runner.gate.clear()
    short, short_pieces = desk.job(prompt(4), max_tokens=20)
    desk.engine.submit([short])
    wait_until(lambda: short.generated == 1)
    long, long_pieces = desk.job(prompt(100), max_tokens=4)
    desk.engine.submit([long])
    runner.gate.set()
    texts = text_of(read_all(long_pieces)), text_of(read_all(short_pieces))
    assert short.generated == 20 and runner.batches.count(1) >= 6  # the short one went on meanwhile
    desk.engine._budget = 512
    assert texts == tuple(text_of(desk.ask((prompt(n), {"max_tokens": m}))[0]) for n, m in ((100, 4), (4, 20)))


def test_the_same_seed_gives_the_same_text_and_another_one_does_not(desk):
    def ask(seed):
        return text_of(desk.ask((prompt(8), {"max_tokens": 20, "temperature": 1.0, "seed": seed}))[0])

    assert ask(1) == ask(1) != ask(2)


def test_the_models_own_end_and_stop_strings_end_an_answer(desk):
    pieces = desk.ask((prompt(8), {"max_tokens": 40, "top_logprobs": 0}))[0]
    whole, ids = text_of(pieces), [token.token_id for piece in pieces for token in piece.tokens]
    stop = whole[9:12]
    pieces = desk.ask((prompt(8), {"max_tokens": 40, "stops": (stop,)}))[0]
    assert pieces[-1].finish == "stop" and text_of(pieces) == whole[: whole.index(stop)]
    end = next(place for place in range(1, 40) if ids[place] not in ids[:place])
    desk.engine._stop_ids = frozenset({ids[end]})
    job, pieces = desk.job(prompt(8), max_tokens=40, ignore_eos=False)
    desk.engine.submit([job])
    ending = read_all(pieces)
    assert ending[-1].finish == "stop" and job.generated == end + 1
    assert whole.startswith(text_of(ending).rstrip("\ufffd"))


def test_a_cancelled_job_frees_its_slot_before_the_next_step(desk, runner):
    runner.gate.clear()
    jobs = [desk.job(prompt(4), max_tokens=100) for _ in range(5)]
    desk.engine.submit([job for job, _ in jobs])
    wait_until(lambda: desk.engine.load() == (3, 2, 3))
    desk.engine.cancel([jobs[0][0], jobs[4][0]])
    runner.gate.set()
    assert read_all(jobs[0][1])[-1].failure == read_all(jobs[4][1])[-1].failure == Failure.CANCELLED
    assert [read_all(pieces)[-1].finish for _, pieces in jobs[1:4]] == ["length"] * 3
    assert is_idle(desk)
    desk.engine.cancel([job for job, _ in jobs])  # those that have ended do not mind


def test_time_runs_out_in_the_queue_and_in_a_slot(desk, runner):
    runner.gate.clear()
    running = [desk.job(prompt(4), max_tokens=100, deadline=time.monotonic() + 0.05) for _ in range(3)]
    waiting = desk.job(prompt(4), deadline=time.monotonic() + 0.05)
    desk.engine.submit([job for job, _ in (*running, waiting)])
    time.sleep(0.08)
    runner.gate.set()
    assert {read_all(pieces)[-1].failure for _, pieces in (*running, waiting)} == {Failure.TIMED_OUT}
    assert waiting[0].generated == 0 and is_idle(desk)


def test_a_full_queue_takes_all_jobs_of_a_request_or_none(served, runner):
    desk = Desk(runner, decode=served.decode, max_queue=2)
    runner.gate.clear()
    jobs = [desk.job(prompt(4), max_tokens=4) for _ in range(5)]
    desk.engine.submit([job for job, _ in jobs[:3]])
    wait_until(lambda: desk.engine.load().running == 3)
    desk.engine.submit([jobs[3][0]])
    with pytest.raises(QueueFullError) as caught:
        desk.engine.submit([job for job, _ in (jobs[4], desk.job(prompt(4)))])
    assert caught.value.retry_after >= 1
    desk.engine.submit([jobs[4][0]])
    runner.gate.set()
    assert [read_all(pieces)[-1].finish for _, pieces in jobs] == ["length"] * 5
    desk.close()


def test_a_step_that_fails_costs_its_jobs_and_nothing_else(desk, runner):
    runner.failing = 1
    assert desk.ask((prompt(4), {"max_tokens": 5}))[0][-1].failure == Failure.BROKEN
    assert desk.ask((prompt(4), {"max_tokens": 5}))[0][-1].finish == "length"
    assert desk.engine.refusal is None


def test_a_copy_that_fails_is_no_end_of_the_engine(desk, runner, monkeypatch):
    def lost(*_):
        raise RuntimeError("the device is lost")

    jobs = [desk.job(prompt(4), max_tokens=length) for length in (3, 50)]
    with monkeypatch.context() as patch:
        patch.setattr(runner.cache, "copy_row", lost)
        desk.engine.submit([job for job, _ in jobs])
        assert {read_all(pieces)[-1].failure for _, pieces in jobs} == {Failure.BROKEN}
    assert desk.ask((prompt(4), {"max_tokens": 5}))[0][-1].finish == "length" and is_idle(desk)


def test_a_device_that_keeps_failing_is_given_up(desk, runner):
    runner.failing = 99
    for _ in range(3):
        assert desk.ask((prompt(4), {"max_tokens": 5}))[0][-1].failure == Failure.BROKEN
    wait_until(lambda: desk.engine.refusal is not None)
    with pytest.raises(UnavailableError, match="restart"):
        desk.engine.submit([desk.job(prompt(4))[0]])


def test_numbers_that_are_none_cost_one_answer(desk, runner):
    runner.gate.clear()
    jobs = [desk.job(prompt(4, seed), max_tokens=6) for seed in range(3)]
    desk.engine.submit([job for job, _ in jobs])
    wait_until(lambda: desk.engine.load().running == 3)
    runner.poison = True
    runner.gate.set()
    endings = [read_all(pieces)[-1] for _, pieces in jobs]
    assert [ending.failure for ending in endings] == [Failure.BROKEN, None, None]


def test_the_row_of_a_job_that_was_cancelled_is_emptied(desk, runner):
    runner.gate.clear()
    job, pieces = desk.job(prompt(4), max_tokens=50)
    desk.engine.submit([job])
    wait_until(lambda: desk.engine.load().running == 1)
    buffers = [buffer for buffer in runner.cache._buffers() if buffer.is_floating_point()]
    buffers[0][0, :, -1] = float("nan")  # what nobody has looked at yet
    job.cancelled = True
    runner.gate.set()
    assert read_all(pieces)[-1].failure == Failure.CANCELLED
    assert all(bool(torch.isfinite(buffer).all()) for buffer in buffers)


def test_draining_refuses_new_jobs_and_stopping_ends_the_rest(desk, runner):
    runner.gate.clear()
    jobs = [desk.job(prompt(4), max_tokens=100) for _ in range(5)]
    desk.engine.submit([job for job, _ in jobs])
    wait_until(lambda: desk.engine.load().running == 3)
    desk.engine.drain()
    with pytest.raises(UnavailableError, match="shutting down"):
        desk.engine.submit([desk.job(prompt(4))[0]])
    desk.engine.stop()
    runner.gate.set()
    assert {read_all(pieces)[-1].failure for _, pieces in jobs} == {Failure.STOPPED}
    desk.engine.join(timeout=10)
    assert is_idle(desk)
