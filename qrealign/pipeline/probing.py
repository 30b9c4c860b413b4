"""Stage "probe": the aligned model's view of malicious and benign, one linear probe a block."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from qrealign.data.encode import ChatEncoder
from qrealign.models.streaming import is_streamed
from qrealign.pipeline.context import RunContext
from qrealign.pipeline.models import ModelPool, free_bytes
from qrealign.probes.fit import fit_probes
from qrealign.probes.probe import SafetyProbe
from qrealign.probes.states import collect_last_states

STATE_BATCH = 16
STREAMED_SHARE = 0.5  # of the free memory: what the activations of a streamed model's batch may take
STREAMED_BYTES = 4 * 2**30  # and no more than this: whoever streams is short of memory, or shares it


def run_probe_stage(context: RunContext) -> SafetyProbe | None:
    """Return the aligned model's probes: given with `--probe`, kept from an earlier attempt, or fitted now.

    None without an aligned model and without `--probe`, and where neither the method nor an analysis asks for them.
    """
    finetuned, path = context.finetuned, context.workspace.state / "probes"
    if context.options.probe:
        probe = SafetyProbe.load(context.options.probe)
    elif context.workspace.done("probe"):
        probe = SafetyProbe.load(path)
    elif context.aligned is None or not (context.settings.uses_probe or context.options.eval != "none"):
        return None
    else:
        with context.workspace.stage("probe", context.meter):
            probe = _fit(context, path)
    probe.check_model(finetuned.num_blocks, finetuned.config.hidden_size)
    return probe


def state_batch(context: RunContext, model: PreTrainedModel, encoder: ChatEncoder, prompts: list[str]) -> int:
    """Return how many prompts pass through a model at once when its states are read.

    A streamed model reads every weight for every batch, so it gets as many prompts as the memory holds: a 7B then reads
    its blocks once or twice. Too many do no harm on a GPU, where a batch that does not fit is halved.
    """
    spec = context.finetuned.spec
    if not is_streamed(model, spec):
        return STATE_BATCH
    config = context.finetuned.config
    wide = getattr(config, "intermediate_size", 0) or 4 * config.hidden_size
    longest = max(map(len, encoder.encode_many(prompts)))
    # One block's live activations for a token: about eight of the hidden size and four of the MLP's.
    prompt_bytes = longest * (8 * config.hidden_size + 4 * wide) * context.pool.dtype.itemsize
    fitting = int(min(STREAMED_SHARE * free_bytes(context.device), STREAMED_BYTES)) // prompt_bytes
    return max(STATE_BATCH, min(len(prompts), fitting))


def _pool(context: RunContext) -> ModelPool:
    """Return the run's pool; where blocks are calibrated one by one, another one that streams, unless asked otherwise.

    The block-wise engine holds no whole model, so what passes through this one once needs not hold it either.
    """
    streams = context.settings.engine == "blockwise" and context.pool.memory != "resident"
    return ModelPool(context.device, memory="streamed", pin=False) if streams else context.pool


def _fit(context: RunContext, path: Path) -> SafetyProbe:
    data, aligned = context.data, context.aligned
    assert aligned is not None
    prompts = [prompt.text for prompt in (*data.probe_malicious, *data.probe_benign)]
    labels = torch.tensor([1] * len(data.probe_malicious) + [0] * len(data.probe_benign))
    model = _pool(context).full_precision("aligned", aligned)
    encoder = context.calibration_encoder
    states = collect_last_states(
        model,
        encoder,
        prompts,
        aligned.spec,
        batch_size=state_batch(context, model, encoder, prompts),
        progress=context.progress("probe: reading the aligned model"),
    )
    probe, _ = fit_probes(states, labels, seed=context.options.seed, progress=context.progress("probe: fitting"))
    probe.save(path, {"model": aligned.fingerprint(), "data": data.fingerprint()})
    return SafetyProbe.load(path)
