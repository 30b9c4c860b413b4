"""Blocks on their way to a device: the right tensors in the right order, read ahead, changed where they arrive."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from qrealign.errors import CheckpointFormatError
from qrealign.models import transfer
from qrealign.models.source import open_model
from qrealign.models.streaming import stream_blocks
from qrealign.models.transfer import BlockLayout, BlockStream, HostBlocks, open_stream, read_blocks
from tests.helpers import random_batch, tiny_adapter, tiny_checkpoint

CPU = torch.device("cpu")
BLOCKS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), num_hidden_layers=BLOCKS, max_shard_size="200KB")


@pytest.fixture(scope="module")
def source(folder):
    return open_model(str(folder))


@pytest.fixture(scope="module")
def adapted(folder, tmp_path_factory):
    return open_model(str(folder), adapter=str(tiny_adapter(tmp_path_factory.mktemp("lora"), folder)))


def same_block(source, index, tensors, dtype=torch.float32):
    expected = source.block_state(index, dtype=dtype)
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_a_layout_gives_every_tensor_its_own_aligned_place():
    layout = BlockLayout.of({"a": ((3, 5), torch.float32), "b": ((7,), torch.bfloat16), "c": ((2,), torch.int64)})
    buffer = torch.zeros(layout.num_bytes, dtype=torch.uint8)
    views = layout.views(buffer)
    for number, (name, view) in enumerate(views.items(), start=1):
        view.fill_(number)
        assert view.data_ptr() % 16 == 0 and layout.places[name][0] % 256 == 0
    assert [float(view.float().mean()) for view in views.values()] == [1.0, 2.0, 3.0]
    assert [tuple(view.shape) for view in views.values()] == [(3, 5), (7,), (2,)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ahead", [1, 3, 9])
def test_blocks_read_ahead_are_those_of_the_files(adapted, dtype, ahead):
    read = list(read_blocks(adapted, CPU, dtype, ahead=ahead))
    assert [index for index, _ in read] == list(range(BLOCKS))
    assert all(same_block(adapted, index, tensors, dtype) for index, tensors in read)
    assert [index for index, _ in read_blocks(adapted, CPU, dtype, start=2)] == [2, 3]


@pytest.mark.parametrize("kept", [0, 2, BLOCKS])
def test_a_stream_follows_the_walk_and_always_has_the_next_block(adapted, kept):
    host = HostBlocks(adapted, torch.float32, CPU, kept=range(kept))
    stream = BlockStream(host, CPU)
    up, down = list(range(BLOCKS)), list(reversed(range(BLOCKS)))
    for index, following in pairwise((*up, *down, *up, *down, 0)):
        assert same_block(adapted, index, stream.acquire(index))
        assert following in {slot.index for slot in stream._slots}
    with torch.no_grad():
        for index in (*up, *up, 2, 0, 3):  # a teacher starts over; a batch that did not fit starts anywhere
            assert same_block(adapted, index, stream.acquire(index))
    stream.close()
    assert len(host._all) == 0


@pytest.mark.parametrize("fixture", ["source", "adapted"])
def test_a_stream_holds_two_blocks_and_reads_and_merges_each_once_where_they_stay(fixture, request, monkeypatch):
    read, merged, source = [], [], request.getfixturevalue(fixture)
    for name, calls in (("unmerged_block", read), ("merge_block", merged)):
        original = getattr(source, name)
        monkeypatch.setattr(
            source,
            name,
            lambda index, rest, calls=calls, original=original: calls.append(index) or original(index, rest),
        )
    stream = BlockStream(HostBlocks(source, torch.float32, CPU, kept=range(BLOCKS)), CPU)
    for _ in range(3):
        for index in range(BLOCKS):
            assert same_block(source, index, stream.acquire(index))
    assert sorted(read) == sorted(merged) == list(range(BLOCKS)) and len(stream._slots) == 2
    stream.close()


def test_blocks_that_do_not_stay_share_few_buffers(source):
    host = HostBlocks(source, torch.float32, CPU, kept=[0])
    stream = BlockStream(host, CPU)
    for _ in range(3):
        for index in range(BLOCKS):
            stream.acquire(index)
    assert len(host._all) <= 1 + 3  # one that stays, and no more than are under way at once
    stream.close()


def test_a_model_streamed_from_host_memory_computes_what_a_resident_one_does(adapted):
    input_ids, mask = random_batch(padding="right")
    model = adapted.skeleton()
    adapted.load_outer(model, "cpu")
    one = adapted.block_layout(0, torch.float32).num_bytes
    stream = open_stream(adapted, torch.float32, CPU, held_bytes=1.5 * one)
    with stream_blocks(model, adapted, CPU, stream=stream), torch.no_grad():
        logits = model(input_ids=input_ids, attention_mask=mask).logits
    assert all(parameter.is_meta for parameter in model.model.layers.parameters())
    with torch.no_grad():
        assert torch.equal(logits, adapted.load_model("cpu")(input_ids=input_ids, attention_mask=mask).logits)


def test_what_a_reader_raises_reaches_the_caller(source, monkeypatch):
    def broken(index, dtype):
        raise CheckpointFormatError("the file is gone")

    monkeypatch.setattr(source, "unmerged_block", broken)
    with pytest.raises(CheckpointFormatError, match="gone"):
        list(read_blocks(source, CPU, torch.float32))


@pytest.mark.parametrize("held", [[], [1], [0, 2], [1, 3], [0, 1, 2, 3]])
def test_blocks_that_stay_come_once_and_the_walk_goes_on_around_them(source, held, monkeypatch):
    read = []
    original = source.unmerged_block
    monkeypatch.setattr(source, "unmerged_block", lambda index, dtype: read.append(index) or original(index, dtype))
    stream = BlockStream(HostBlocks(source, torch.float32, CPU), CPU, held=held)
    up, down = list(range(BLOCKS)), list(reversed(range(BLOCKS)))
    for index in (*up, *down, *up, *down):
        assert same_block(source, index, stream.acquire(index))
    assert all(read.count(index) == 1 for index in held)
    assert len(stream._slots) == min(2, BLOCKS - len(held))
    stream.close()


@pytest.mark.parametrize(
    ("held", "available", "staying", "pinned"),
    [(0, 0, set(), set()), (0, 2.5, set(), {0, 1}), (2.2, 99, {1, 3}, {0, 2}), (9, 99, {0, 1, 2, 3}, set())],
)
def test_what_stays_follows_from_the_memory(source, monkeypatch, held, available, staying, pinned):
    one = source.block_layout(0, torch.float32).num_bytes
    monkeypatch.setattr(transfer, "available_host_bytes", lambda: available * one / transfer.PINNED_SHARE)
    stream = open_stream(source, torch.float32, CPU, held_bytes=held * one)
    assert set(stream._held) == staying and stream.host.kept == pinned
    stream.close()
