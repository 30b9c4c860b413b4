"""Devices by name, and models that are held where they fit and streamed where they do not."""

from __future__ import annotations

import pytest
import torch

from qrealign.errors import AbsentDeviceError, CheckpointFormatError
from qrealign.models.device import choose_device, compute_dtype, free_bytes
from qrealign.models.loading import load_or_stream
from qrealign.models.source import open_model
from tests.helpers import random_batch, tiny_checkpoint

CPU = torch.device("cpu")


def test_devices_are_chosen_by_name():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert compute_dtype(CPU) is torch.float32
    assert compute_dtype(torch.device("cuda")) is torch.bfloat16
    assert free_bytes(CPU) > 0


@pytest.mark.parametrize(
    ("name", "words"), [("abacus", "is no device"), ("cuda:99", "was asked for"), ("meta", "not supported")]
)
def test_devices_that_cannot_be_used_are_refused(name, words):
    with pytest.raises(AbsentDeviceError, match=words):
        choose_device(name)


def test_a_model_computes_the_same_held_or_streamed(tmp_path, monkeypatch, caplog):
    source = open_model(str(tiny_checkpoint(tmp_path / "model", dtype=torch.bfloat16)))
    input_ids, mask = random_batch()
    held = load_or_stream(source, CPU)
    assert {parameter.dtype for parameter in held.parameters()} == {torch.float32}
    assert not any(parameter.is_meta for parameter in held.parameters())
    # 60 % of the free memory must hold the weights in the compute dtype, which here is twice the stored one.
    monkeypatch.setattr("qrealign.models.loading.free_bytes", lambda _: 2 * source.total_bytes / 0.6 - 1)
    streamed = load_or_stream(source, CPU)
    assert "streamed" in caplog.text
    assert any(parameter.is_meta for parameter in streamed.parameters())
    with torch.no_grad():
        expected, found = (model(input_ids=input_ids, attention_mask=mask).logits for model in (held, streamed))
    assert torch.equal(expected, found)


def test_a_language_model_is_no_classifier(tmp_path):
    folder = tiny_checkpoint(tmp_path / "model")
    with pytest.raises(CheckpointFormatError, match=r"score\.weight"):
        open_model(str(folder), head="classification")
