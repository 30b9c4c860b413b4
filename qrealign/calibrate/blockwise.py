"""The block-wise engine: one block in memory, learned against its targets, then frozen, then the next.

Streams: the fine-tuned model's (target of every benign sample), the student's own (input of the block being trained)
and, where the method asks for it, the aligned model's (target of the malicious samples).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from qrealign.calibrate.blocksteps import BlockSteps
from qrealign.calibrate.distributed import ALONE, Team
from qrealign.calibrate.handover import HandOver
from qrealign.calibrate.losses import alignment_loss, reconstruction_loss
from qrealign.calibrate.methods import CalibrationSettings
from qrealign.calibrate.parameters import BlockContext, Trainable
from qrealign.calibrate.schedule import block_epochs, stratified_batches
from qrealign.calibrate.state import load_progress, save_progress
from qrealign.calibrate.streams import InputMaxima, Inputs, Streams, advance, stream_place
from qrealign.config import QuantScheme
from qrealign.data.capture import run_block
from qrealign.models.source import ModelSource
from qrealign.probes.probe import SafetyProbe
from qrealign.quant.fake_quant import freeze_linears, swap_linears
from qrealign.quant.fused import fused_inputs, fused_rotation
from qrealign.records import CurvePoint

STREAM_TOKENS = {"cuda": 8192, "cpu": 2048}  # of a pass that moves a stream on
WRITERS = 3  # frozen blocks on their way to the disk at a time
SAVE_SECONDS = 10  # between two saves on a GPU, where a block takes less than writing the streams: a kill costs these


@dataclass(kw_only=True)
class Target:
    """What one block is trained towards: benign samples by `benign`, malicious ones by the method's target."""

    benign: Tensor
    aligned: Tensor | None
    probe: SafetyProbe | None


@dataclass(kw_only=True)
class BlockwiseCalibrator:
    """Calibrates a model block by block.

    Args:
        source: the fine-tuned model; `model` is its skeleton, embeddings loaded.
        aligned: the aligned model and its skeleton, where the method's target needs them.
        on_block: receives each frozen block before its progress is saved; on a GPU from threads, some at a time.
        on_trained: receives each block before it is frozen, its parameters still attached.
        state_path: where the streams are kept; a file found there is continued.
        low_memory: keep the streams in host memory.
        team: the processes that share every batch; the first one alone hands blocks over and saves.
    """

    source: ModelSource
    model: PreTrainedModel
    scheme: QuantScheme
    settings: CalibrationSettings
    inputs: Inputs
    streams: Streams
    on_block: Callable[[int, nn.Module], None]
    state_path: Path
    device: torch.device
    dtype: torch.dtype
    aligned: tuple[ModelSource, PreTrainedModel] | None = None
    probe: SafetyProbe | None = None
    on_trained: Callable[[int, nn.Module], None] | None = None
    low_memory: bool = False
    team: Team = ALONE
    curve: list[CurvePoint] = field(default_factory=list)
    seconds: dict[int, float] = field(default_factory=dict)

    def run(self, *, progress: str | None) -> list[CurvePoint]:
        """Calibrate every block that is not done yet and return the loss curve.

        Raises:
            CalibrationDivergedError: a block's losses stayed non-finite after the restarts.
        """
        start = self._resume()
        self._saved, self._delivered = time.perf_counter(), list[Future[None]]()
        self._place = stream_place(self.device, self.dtype, low_memory=self.low_memory)
        self.streams = Streams(**{name: self._place(stream) for name, stream in self.streams.tensors().items()})
        self.classes = self.inputs.malicious.cpu()
        self.inputs = self.inputs.to(self.device)
        self.probe = None if self.probe is None else self.probe.to(self.device)
        bar = tqdm(
            total=self._steps_before(self.source.num_blocks),
            initial=self._steps_before(start),
            desc=progress,
            disable=progress is None,
            unit="step",
        )
        with bar, ExitStack() as stack:
            blocks = stack.enter_context(closing(self._blocks(self.source, self.model, start)))
            if self.aligned is not None:
                self._aligned_blocks = stack.enter_context(closing(self._blocks(*self.aligned, start)))
            self._hand_over = stack.enter_context(HandOver(self.device, WRITERS))
            for index in range(start, self.source.num_blocks):
                begin = time.perf_counter()
                frozen = self._calibrate_block(index, next(blocks), bar)
                self.seconds[index] = time.perf_counter() - begin
                self._deliver(index, frozen)
                bar.n = self._steps_before(index + 1)  # a block may have needed fewer
        return self.curve

    def steps_of(self, index: int) -> int:
        """Return how many optimizer steps block `index` gets at most."""
        epochs = block_epochs(index, self.source.num_blocks, self.settings.epochs)
        return max(1, round(epochs * len(self.inputs.mask) / self.settings.batch_size))

    def _steps_before(self, block: int) -> int:
        return sum(self.steps_of(index) for index in range(block))

    def _blocks(self, source: ModelSource, model: PreTrainedModel, start: int) -> Generator[nn.Module, None, None]:
        """Yield the blocks of a model; on a GPU the next is read, and loaded unless memory is low, meanwhile."""
        blocks = source.load_blocks(model, self.device, self.dtype, start=start, ahead=1)
        if self.device.type == "cpu" or self.low_memory:
            yield from blocks
            return
        with ThreadPoolExecutor(1, thread_name_prefix="load-block") as thread:
            ahead = thread.submit(next, blocks, None)
            while (block := ahead.result()) is not None:
                ahead = thread.submit(next, blocks, None)
                yield block

    def _calibrate_block(self, index: int, block: nn.Module, bar: tqdm) -> nn.Module:
        """Learn one block, move all streams past it and return it frozen."""
        rows = torch.arange(len(self.inputs.mask), device=self.device)
        with InputMaxima(block) as maxima:
            self.streams.finetuned = self._advance(block, index, self.streams.finetuned, rows)
        self.team.keep_largest(maxima.values)
        target = Target(benign=self.streams.finetuned, aligned=self._advance_aligned(index), probe=self.probe)
        swap_linears(block, self.scheme, scale_dtype=self.source.storage_dtype, skip=self.source.spec.skip)
        context = BlockContext(
            block=block, index=index, spec=self.source.spec, settings=self.settings, activation_amax=maxima.values
        )
        trainable = Trainable([context])
        with ExitStack() as fused:
            if self.device.type == "cuda":
                fused.enter_context(fused_inputs(block, self.source.spec))
                fused.enter_context(fused_rotation(block))
            self._train(index, block, trainable, target, bar)
        if self.on_trained is not None:
            self.on_trained(index, block)
        trainable.fold(self.source.storage_dtype)
        frozen = freeze_block(block, self.source.storage_dtype)
        self.streams.student = self._advance(frozen, index, self.streams.student, rows)
        return frozen

    def _advance(self, block: nn.Module, index: int, stream: Tensor, rows: Tensor) -> Tensor:
        size = max(1, STREAM_TOKENS[self.device.type] // stream.shape[1])
        return advance(block, index, stream, self.inputs, rows=rows, batch_size=size, place=self._place, team=self.team)

    def _advance_aligned(self, index: int) -> Tensor | None:
        """Move the aligned stream past its own block; only malicious samples need it."""
        if self.aligned is None or self.streams.aligned is None:
            return None
        block = next(self._aligned_blocks)
        malicious = self.inputs.malicious.nonzero().flatten()
        self.streams.aligned = self._advance(block, index, self.streams.aligned, malicious)
        block.to("meta")
        return self.streams.aligned

    def _train(self, index: int, block: nn.Module, trainable: Trainable, target: Target, bar: tqdm) -> None:
        """Make the block's steps."""

        def losses_of(rows: Tensor) -> Tensor:
            output = run_block(block, self.streams.student[rows], self.inputs.kwargs_of(index, rows))
            return self.sample_losses(index, output, target, rows)

        def on_steps(done: int, loss: float) -> None:
            bar.update(start + done - bar.n)
            bar.set_postfix(block=index, loss=f"{loss:.4f}", refresh=False)

        start = bar.n
        steps = BlockSteps(
            index=index,
            trainable=trainable,
            losses_of=losses_of,
            order=self._order(index),
            malicious=self.classes,
            device=self.device,
            epoch=max(1, round(len(self.classes) / self.settings.batch_size)),
            plateau=self.settings.plateau,
            team=self.team,
        )
        self.curve += steps.run(on_steps)

    def _order(self, index: int) -> Tensor:
        """Return the samples of every step of a block, `[S, B]`."""
        settings, malicious = self.settings, self.classes
        share = settings.batch_malicious_share if settings.batch_size > 1 else float(malicious.float().mean())
        batches = stratified_batches(
            malicious.nonzero().flatten().tolist(),
            (~malicious).nonzero().flatten().tolist(),
            batch_size=settings.batch_size,
            malicious_share=share,
            seed=(settings.seed << 16) + index,
        )
        return torch.tensor(list(islice(batches, self.steps_of(index))))

    def sample_losses(self, index: int, output: Tensor, target: Target, rows: Tensor) -> Tensor:
        """Return each sample's loss, `[B]` float32: reconstruction, and for malicious samples the method's target."""
        mask, malicious = self.inputs.mask[rows], self.inputs.malicious[rows]
        losses = reconstruction_loss(output, target.benign[rows], mask)
        if target.aligned is not None:
            return torch.where(malicious, reconstruction_loss(output, target.aligned[rows], mask), losses)
        if target.probe is not None:
            last = output[torch.arange(len(rows), device=output.device), self.inputs.last_index[rows]]
            return torch.where(malicious, alignment_loss(target.probe.logit(last.float(), index)), losses)
        return losses

    def _deliver(self, index: int, frozen: nn.Module) -> None:
        """Hand a block over and save the progress, on a GPU while the next blocks are trained."""
        now = time.perf_counter()
        saves = self.device.type == "cpu" or now - self._saved >= SAVE_SECONDS
        self._saved = now if saves else self._saved
        streams = self.streams.tensors()
        extra = {
            "done": index + 1,
            "curve": [asdict(point) for point in self.curve],
            "seconds": list(self.seconds.items()),
        }

        before = list(self._delivered)

        def deliver() -> None:
            self.on_block(index, frozen.to("cpu"))  # one copy, however often it is looked at
            frozen.to("meta")
            if saves:
                for earlier in before:  # a run that is continued skips every block before the saved one
                    earlier.result()
                save_progress(self.state_path, streams, extra)

        if self.team.leads:
            self._delivered += self._hand_over.submit(deliver)
        else:
            frozen.to("meta")

    def _resume(self) -> int:
        found = load_progress(self.state_path)
        if found is None:
            return 0
        tensors, extra = found
        self.streams = Streams(**tensors)
        self.curve = [CurvePoint(**point) for point in extra["curve"]]
        self.seconds = {index: seconds for index, seconds in extra["seconds"]}
        return int(extra["done"])


@torch.no_grad()
def freeze_block(block: nn.Module, storage_dtype: torch.dtype) -> nn.Module:
    """Replace fake quantization by codes, round every other parameter as the checkpoint stores it; return the block."""
    freeze_linears(block)
    for parameter in block.parameters():  # in memory of its own: weights were loaded into one piece
        parameter.data = parameter.to(storage_dtype).to(parameter.dtype, copy=True)
    return block
