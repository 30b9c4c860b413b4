"""`load_packed`: a packed checkpoint as an ordinary Hugging Face model whose weights stay packed in memory."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING

import torch

from qrealign.deploy.blocks import deploy_block
from qrealign.deploy.outer import check_head_bits, host_embedding, pack_head
from qrealign.deploy.steps import fuse_steps
from qrealign.models.device import choose_device, compute_dtype
from qrealign.pack.source import PackedSource, open_packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def load_packed(
    folder: str | PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    head_bits: int | None = None,
    embedding_on_host: bool = False,
) -> PreTrainedModel:
    """Return the model of a packed checkpoint, ready to generate, its weights packed as the device's kernels read them.

    It is the Hugging Face model of the checkpoint's type in eval mode: `generate`, static caches, `torch.compile`,
    batches and left padding work as they do there. Tensors are read one layer at a time, unpacked and laid out anew on
    the device, so the model never exists in floating point; the files are not changed.

    Args:
        folder: a compressed-tensors checkpoint with int8 or int4 weights, of this project or of llm-compressor; a Hub
            id may be given too.
        device: where it runs; None takes a GPU where there is one.
        dtype: of activations, embeddings, norms and head; None takes bfloat16 on a GPU and float32 on a CPU.
        head_bits: 8 rounds the head to int8, one scale a row; None leaves it in `dtype`.
        embedding_on_host: keep the embedding's table in the host's pinned memory, from where a GPU reads the rows that
            it needs. Nothing changes on a CPU.

    Raises:
        ConfigError: no head has codes of that width.
        ModelError: the folder is missing or no model.
        CheckpointFormatError: weights are missing or damaged, or a layer asks for what is not run here: the message
            names it.
        AbsentDeviceError: the device is absent.
    """
    chosen = choose_device("auto" if device is None else str(device))
    return deploy_model(
        open_packed(str(folder)),
        chosen,
        dtype or compute_dtype(chosen),
        head_bits=head_bits,
        embedding_on_host=embedding_on_host,
    )


@torch.no_grad()
def deploy_model(
    source: PackedSource,
    device: torch.device,
    dtype: torch.dtype,
    *,
    head_bits: int | None = None,
    embedding_on_host: bool = False,
) -> PreTrainedModel:
    """Return the model of an opened packed checkpoint; see `load_packed`."""
    check_head_bits(head_bits)
    model = source.skeleton(dtype=dtype)
    for index in range(source.num_blocks):
        deploy_block(model, source, index, device, dtype)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # where blocks were unpacked; what comes now is larger than any of it
    source.load_outer(model, device, dtype)
    if head_bits is not None:
        pack_head(model, head_bits)
    if embedding_on_host and device.type == "cuda":
        host_embedding(model)
    if device.type == "cuda":
        fuse_steps(model, source.spec)
    return model
