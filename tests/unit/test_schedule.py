"""Schedules: stratified, exhaustive, repeatable."""

from collections import Counter
from itertools import islice

import pytest

from qrealign.calibrate.schedule import block_epochs, stratified_batches, warm_cosine


def test_every_batch_holds_both_classes_and_every_sample_comes_up():
    batches = list(islice(stratified_batches(range(30), range(30, 50), batch_size=10, malicious_share=0.5, seed=1), 12))
    assert all(sum(index < 30 for index in batch) == 5 for batch in batches)
    counts = Counter(index for batch in batches for index in batch)
    assert {counts[index] for index in range(30)} == {2} and {counts[index] for index in range(30, 50)} == {3}


def test_batches_of_one_keep_the_share_in_every_stretch():
    batches = list(
        islice(stratified_batches(range(15), range(15, 20), batch_size=1, malicious_share=0.75, seed=3), 200)
    )
    for start in range(0, 200, 20):
        assert sum(batch[0] < 15 for batch in batches[start : start + 20]) == 15


def test_same_seed_same_batches_and_one_class_alone():
    first, second, other = (
        list(islice(stratified_batches(range(9), range(9, 12), batch_size=4, malicious_share=0.5, seed=s), 20))
        for s in (0, 0, 1)
    )
    assert first == second != other
    assert all(
        len(batch) == 4
        for batch in islice(stratified_batches(range(9), [], batch_size=4, malicious_share=0.5, seed=0), 5)
    )
    assert all(
        len(batch) == 4
        for batch in islice(stratified_batches([], range(9), batch_size=4, malicious_share=0.5, seed=0), 5)
    )


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    factors = [warm_cosine(step, 80, 5) for step in range(80)]
    assert factors[0] == pytest.approx(0.2) and max(factors) == pytest.approx(1.0) and factors[4] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.1, abs=0.01) and factors[5:] == sorted(factors[5:], reverse=True)


def test_paper_epochs():
    assert [block_epochs(index, 32, 10) for index in (0, 16, 17, 31)] == [5, 5, 15, 15]
