"""One model on one GPU: its memory, the rate of a prefill, and the time of a decoding step."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.calibration.geometries import Geometry
from benchmarks.decode.synthetic import random_source
from qrealign.deploy.decoder import StaticDecoder
from qrealign.deploy.load import deploy_model
from qrealign.pack.source import PackedSource
from qrealign_kernels.triton_common import one_by_one

CACHE_TOKENS = 2048
PROMPT_TOKENS = 1024
STEPS = 200
PREFILLS = 10
_BUFFERS = ("keys", "values", "key_scale", "value_scale")
WARM_UP = 0.5  # share of the timed calls that run before them, untimed: an idle GPU's clocks are low


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model is measured.

    `compiled` says whether `torch.compile` fuses a step's small kernels; `small` whether the model was loaded and the
    cache made for the least memory: an int8 head, the embedding on the host, int8 keys and values.
    """

    batch: int = 1
    compiled: bool = False
    small: bool = False
    prompt_piece: int | None = None
    cache_tokens: int = CACHE_TOKENS
    prompt_tokens: int = PROMPT_TOKENS
    steps: int = STEPS


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the results; bytes are of the device's allocator.

    `stored_bytes` are those of the tensors on disk, `loading_bytes` the most that was taken from the driver on the way,
    `total_bytes` weights, cache and what a recorded step keeps, `peak_bytes` the most while prompts and steps ran.
    """

    geometry: str
    weights: str
    batch: int
    compiled: bool
    small: bool
    cache_tokens: int
    prompt_tokens: int
    prompt_piece: int | None
    prefill_tokens_per_s: float
    step_ms: float
    step_ms_p20: float
    step_ms_p80: float
    tokens_per_s: float
    stored_bytes: int
    weight_bytes: int
    loading_bytes: int
    cache_bytes: int
    total_bytes: int
    peak_bytes: int


def load(
    geometry: Geometry, scheme: str | None, device: torch.device, *, small: bool = False
) -> tuple[PreTrainedModel, dict[str, int]]:
    """Return the model of a random checkpoint with what it takes: stored, in memory, and at most while loading."""
    forget(device)
    source, before = random_source(geometry, scheme), allocated(device)
    if isinstance(source, PackedSource):
        head_bits = 8 if small else None
        model = deploy_model(source, device, torch.bfloat16, head_bits=head_bits, embedding_on_host=small)
        stored = source.packed_bytes
    else:
        model, stored = source.load_model(device, torch.bfloat16), source.total_bytes
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
    return model, {"stored": stored, "weights": allocated(device) - before, "loading": peak}


def measure(
    model: PreTrainedModel, geometry: Geometry, scheme: str | None, settings: Settings, sizes: dict[str, int]
) -> tuple[Row, StaticDecoder]:
    """Return the row of a loaded model under these settings, and the decoder that was timed."""
    device = model.device
    forget(device)
    before = allocated(device)
    decoder = StaticDecoder(
        model,
        batch_size=settings.batch,
        max_length=settings.cache_tokens,
        compile_step=settings.compiled,
        cache_bits=8 if settings.small else None,
        prompt_piece=settings.prompt_piece,
    )
    prompt = random_prompt(geometry, settings, device)
    prefills = time_calls(lambda: decoder.prefill(prompt), PREFILLS, device)
    token_ids = decoder.prefill(prompt).argmax(dim=-1)

    def step() -> None:
        token_ids.copy_(decoder.step(token_ids).argmax(dim=-1))

    seconds = time_calls(step, settings.steps, device)
    quantiles = statistics.quantiles(seconds, n=5)
    median = statistics.median(seconds)
    buffers = [getattr(layer, name, None) for layer in decoder.cache.layers for name in _BUFFERS]
    cache = sum(buffer.nbytes for buffer in buffers if buffer is not None)
    row = Row(
        geometry=geometry.folder,
        weights=scheme or "bf16",
        batch=settings.batch,
        compiled=settings.compiled,
        small=settings.small,
        cache_tokens=settings.cache_tokens,
        prompt_tokens=settings.prompt_tokens,
        prompt_piece=settings.prompt_piece,
        prefill_tokens_per_s=settings.batch * settings.prompt_tokens / statistics.median(prefills),
        step_ms=1000 * median,
        step_ms_p20=1000 * quantiles[0],
        step_ms_p80=1000 * quantiles[-1],
        tokens_per_s=settings.batch / median,
        stored_bytes=sizes["stored"],
        weight_bytes=sizes["weights"],
        loading_bytes=sizes["loading"],
        cache_bytes=cache,
        total_bytes=sizes["weights"] + allocated(device) - before,
        peak_bytes=sizes["weights"] + torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0,
    )
    return row, decoder


def random_prompt(geometry: Geometry, settings: Settings, device: torch.device) -> Tensor:
    """Return `[batch, prompt_tokens]` token ids."""
    return torch.randint(3, geometry.vocabulary, (settings.batch, settings.prompt_tokens), device=device)


def time_calls(call: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Return the seconds of `count` calls, each between two events of the GPU, after some that are not counted."""
    for _ in range(1 + int(WARM_UP * count)):
        call()
    if device.type != "cuda":
        moments = [time.perf_counter()]
        for _ in range(count):
            call()
            moments.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(moments)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize(device)
    return [before.elapsed_time(after) / 1000 for before, after in itertools.pairwise(events)]


def profile_steps(decoder: StaticDecoder, prompt: Tensor, steps: int = 8) -> dict[str, tuple[float, int]]:
    """Return the GPU's microseconds and launches a step of every kernel by name, the longest first.

    Each kernel runs alone here. Those that are started early otherwise would be charged with the time they wait.
    """
    from torch.profiler import ProfilerActivity, profile

    with one_by_one():
        decoder.record()
    token_ids = decoder.prefill(prompt).argmax(dim=-1)
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        for _ in range(steps):
            decoder.step(token_ids)
        torch.cuda.synchronize()
    found = {
        event.key: (event.self_device_time_total / steps, event.count // steps)
        for event in record.key_averages()
        if event.self_device_time_total
    }
    return dict(sorted(found.items(), key=lambda item: -item[1][0]))


def forget(device: torch.device) -> None:
    """Let go of what an earlier measurement left: decoders that compiled code refers to, and cached memory."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def allocated(device: torch.device) -> int:
    """Return the bytes of live tensors on a GPU, 0 on a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
