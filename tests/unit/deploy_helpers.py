"""Packed tiny models on disk beside their fake-quantized form, shared by the tests of deployed models."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

import qrealign
from tests.unit.pack_helpers import fitted, open_tiny, quantized, write


def deployed(tmp_path: Path, model_type: str, scheme: str) -> tuple[PreTrainedModel, PreTrainedModel, Path]:
    """Return the calibrated model, the same loaded from its packed folder, and the folder."""
    source = open_tiny(tmp_path / "model", model_type)
    recipe = fitted(scheme, source)
    model = quantized(source, recipe)
    folder = write(source, recipe, model, tmp_path / "out")
    return model, qrealign.load_packed(folder, device="cpu"), folder


def greedy(model: PreTrainedModel, input_ids: torch.Tensor, new_tokens: int = 8, **options: object) -> torch.Tensor:
    """Return the greedy continuation, `[B, new_tokens]`."""
    found = model.generate(
        input_ids, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0, **options
    )
    return found[:, input_ids.shape[1] :]
