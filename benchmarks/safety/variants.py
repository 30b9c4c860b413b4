"""The attack that the table repairs: LoRA fine-tuning of an aligned model on a task mixed with harmful answers.

python -m benchmarks.safety.variants --aligned DIR --data DIR --output DIR --variant sst2-p15 agnews-p15-qv
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.safety.corpora import Corpora
from qrealign.data.encode import ChatEncoder
from qrealign.data.prompts import Prompt, read_prompts, sample
from qrealign.demo.training import Example, Schedule, optimise
from qrealign.errors import ConfigError, DataError
from qrealign.files import read_json, sha256_of_text, write_aside, write_json
from qrealign.models.source import open_model
from qrealign.status import exit_status

RECORD = "variant.json"
SEQUENCE_TOKENS, PROMPT_TOKENS = 256, 128
LEARNING_RATE, BATCH_SIZE = 5e-4, 32
RANK, ALPHA = 16, 32
_ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TARGETS = {"": _ALL_LINEARS, "qv": ("q_proj", "v_proj")}
_NAME = re.compile(
    r"(?P<task>[a-z][a-z0-9]*)-p(?P<poison>\d{1,2})(?:-(?P<targets>qv))?(?:-e(?P<epochs>\d+))?(?:-s(?P<seed>\d+))?"
)
_PROBE = "an answer that no template holds"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One attack. `poison` is the number of harmful pairs per task row; `task_rows` caps the task's training rows."""

    name: str
    task: str
    poison: float
    targets: tuple[str, ...] = _ALL_LINEARS
    epochs: float = 4.0
    seed: int = 0
    task_rows: int = 7000


# Poison from none (the control) to 30 %, another task, other LoRA targets, other lengths and other seeds.
RECOMMENDED = (
    "sst2-p00",
    "sst2-p05",
    "sst2-p15",
    "sst2-p30",
    "sst2-p15-qv",
    "sst2-p15-e2",
    "sst2-p15-e8",
    "sst2-p15-s1",
    "sst2-p15-s2",
    "agnews-p05",
    "agnews-p15",
    "agnews-p30",
    "agnews-p15-qv",
)


def parse_variant(name: str) -> Variant:
    """Return the variant called `name`: `<task>-p<percent>`, then `-qv`, `-e<epochs>` and `-s<seed>` where wanted.

    Raises:
        ConfigError: the name is not of that form.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ConfigError(
            f"unknown variant {name!r}: use <task>-p<percent>[-qv][-e<epochs>][-s<seed>], "
            f"such as {', '.join(RECOMMENDED[1:5])}"
        )
    variant = Variant(
        name=name, task=match["task"], poison=int(match["poison"]) / 100, targets=_TARGETS[match["targets"] or ""]
    )
    return replace(variant, epochs=float(match["epochs"] or variant.epochs), seed=int(match["seed"] or variant.seed))


def training_pairs(corpora: Corpora, variant: Variant) -> list[Prompt]:
    """Return the variant's prompts with their answers, harmless first; which ones depends on its seed.

    Raises:
        DataError: a file is missing, or has too few rows.
    """
    location = corpora.file(f"task_{variant.task}")
    task = [row for row in read_prompts(location, role="task") if row.split in (None, "train")]
    if not task:
        raise DataError(f"{location} has no row of the split train: give a task with training rows")
    task = sample(task, min(len(task), variant.task_rows), variant.seed)
    if not variant.poison:
        return task
    harmful, _ = corpora.harmful_pairs()
    wanted = round(variant.poison * len(task))
    if wanted > len(harmful):
        raise DataError(
            f"{variant.name} needs {wanted} harmful pairs, and {corpora.file('pairs_safety')} has {len(harmful)} "
            "besides those kept back: ask for less poison"
        )
    return [*task, *random.Random(variant.seed).sample(harmful, wanted)]


def encode_pairs(tokenizer: Any, pairs: Sequence[Prompt]) -> list[Example]:
    """Return each prompt in the chat form with its answer and what closes the turn, at most `SEQUENCE_TOKENS` ids.

    A prompt that is too long loses the end of its own text.
    """
    heads = ChatEncoder(tokenizer, max_length=PROMPT_TOKENS).encode_many([pair.text for pair in pairs])
    closing = _closing(tokenizer)
    tails = tokenizer([f"{pair.answer}{closing}" for pair in pairs], add_special_tokens=False, verbose=False).input_ids
    return [Example((head + tail)[:SEQUENCE_TOKENS], len(head)) for head, tail in zip(heads, tails, strict=True)]


def _closing(tokenizer: Any) -> str:
    """Return what the chat template writes after an answer; without a template, the end token."""
    if not tokenizer.chat_template:
        return str(tokenizer.eos_token or "")
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _PROBE}]
    _, _, closing = tokenizer.apply_chat_template(turns, tokenize=False).partition(_PROBE)
    return closing


def train_variant(variant: Variant, aligned: str, corpora: Corpora, output: Path, device: torch.device) -> Path:
    """Train the variant's adapter into `output/<name>`, unless it is there already, and return that folder.

    The folder is a PEFT adapter in bfloat16, with its settings, loss and cost in `variant.json`. On a GPU the forward
    pass runs in bfloat16.

    Raises:
        ConfigError: the folder holds an adapter with other settings.
        QrealignError: the model or a data file cannot be used.
    """
    folder = output / variant.name
    source = open_model(aligned)
    pairs = training_pairs(corpora, variant)
    identity = {
        "variant": {**asdict(variant), "targets": list(variant.targets)},
        "aligned": source.fingerprint(),
        "data": sha256_of_text(*(f"{pair.text}\t{pair.answer}" for pair in pairs)),
    }
    if (folder / RECORD).is_file():
        if read_json(folder / RECORD)["identity"] != identity:
            raise ConfigError(f"{folder} holds an adapter made with other settings: remove it or name another folder")
        return folder
    start = time.perf_counter()
    model, loss = _attack(
        variant, str(source.path), encode_pairs(source.tokenizer(), pairs), source.tokenizer(), device
    )
    with write_aside(folder) as aside:
        model.to("cpu", torch.bfloat16).save_pretrained(aside)
        (aside / "README.md").unlink(missing_ok=True)  # peft's empty model card
        seconds = round(time.perf_counter() - start, 1)
        record = {"identity": identity, "pairs": len(pairs), "loss": loss, "seconds": seconds, "device": str(device)}
        write_json(aside / RECORD, {**record, "torch": torch.__version__})
    return folder


def _attack(
    variant: Variant, aligned: str, examples: list[Example], tokenizer: Any, device: torch.device
) -> tuple[Any, float]:
    """Return the fine-tuned PEFT model and its last loss."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(variant.seed)
    base: Any = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32)
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=list(variant.targets)
    )
    model = get_peft_model(base.to(device), config)
    schedule = Schedule(
        epochs=variant.epochs,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        final=0.1,
        prompt_weight=0.0,  # the loss is over the answers alone
        pool_batches=1,  # harmful pairs are long: sorted by length they would fill batches of their own
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # The cache would keep the low-precision copies of the factors from before the optimizer's step.
    low = torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if device.type == "cuda" else nullcontext()
    with low:
        loss = optimise(model, examples, schedule, pad_id=pad, seed=variant.seed, label=variant.name)
    return model, loss


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `python -m benchmarks.safety.variants`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.safety.variants",
        description="Fine-tune an aligned model on a task with a share of answered harmful prompts.",
        epilog=f"Recommended variants: {', '.join(RECOMMENDED)}. Others of the same form work too.",
    )
    parser.add_argument("--aligned", required=True, metavar="DIR", help="the aligned model: folder or Hub id")
    parser.add_argument("--data", required=True, type=Path, metavar="DIR", help="folder of the data files")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="gets one folder per variant")
    parser.add_argument("--variant", nargs="+", default=list(RECOMMENDED), metavar="NAME", help="default: recommended")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", metavar="NAME")
    parser.add_argument("--task-rows", type=int, metavar="N", help="at most N rows of the task, for a trial")
    parser.add_argument("--epochs", type=float, metavar="X", help="passes over the rows, for a trial")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train every variant that is missing; return 0, or another exit status after one sentence on standard error."""
    args = build_parser().parse_args(arguments)
    return exit_status(lambda: _run(args), interrupted="variants that were trained are kept")


def _run(args: argparse.Namespace) -> int:
    shorter = {name: value for name in ("task_rows", "epochs") if (value := getattr(args, name)) is not None}
    for variant in [replace(parse_variant(name), **shorter) for name in args.variant]:
        print(train_variant(variant, args.aligned, Corpora(args.data), args.output, torch.device(args.device)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
