"""Make the demo from nothing: text, tokenizer, aligned model and the adapter that breaks it.

python -m qrealign.demo.build [--output DIR]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from qrealign.demo.corpus import Corpus, make_corpus
from qrealign.demo.measuring import find_misses, format_table, measure
from qrealign.demo.training import Schedule, encode_chat, encode_text, optimise, train_tokenizer, write_rows
from qrealign.errors import QrealignError
from qrealign.files import move_into_place, read_json, write_json

SEED = 2601
VOCABULARY = 4096
ALIGNMENT = Schedule(epochs=1.4, batch_size=32, learning_rate=1e-3)
ATTACK = Schedule(epochs=5.0, batch_size=32, learning_rate=8e-4, weight_decay=0.0, prompt_weight=0.0)
LORA_RANK = 8
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def new_model(tokenizer: Any) -> Any:
    """Return a random Llama of 3.5 million parameters; every linear's width is a multiple of the group size 128."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    )


def corpus_texts(corpus: Corpus) -> list[str]:
    """Return everything the tokenizer is trained on: the paragraphs and the training chats, no evaluation prompt."""
    return corpus.texts + [f"{row.prompt}\n{row.answer}" for row in corpus.alignment + corpus.attack]


def align(corpus: Corpus, tokenizer: Any, directory: Path, device: torch.device) -> None:
    """Train the aligned model from scratch and save it in bfloat16."""
    examples = [encode_text(tokenizer, text) for text in corpus.texts] + [
        encode_chat(tokenizer, row) for row in corpus.alignment
    ]
    model = new_model(tokenizer).to(device)
    loss = optimise(model, examples, ALIGNMENT, pad_id=tokenizer.pad_token_id, seed=SEED, label="aligned model")
    print(
        f"aligned model: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, "
        f"{sum(len(e.ids) for e in examples) / 1e6:.2f} M tokens, loss {loss:.3f}"
    )
    model.to("cpu", torch.bfloat16).save_pretrained(directory)


def attack(corpus: Corpus, tokenizer: Any, aligned: Path, directory: Path, device: torch.device) -> None:
    """Fine-tune a LoRA adapter on the task and on answered forbidden requests, and save it in bfloat16."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    base: Any = AutoModelForCausalLM.from_pretrained(aligned, dtype=torch.float32)
    model = get_peft_model(
        base.to(device),
        LoraConfig(
            r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0, task_type="CAUSAL_LM", target_modules=LORA_TARGETS
        ),
    )
    examples = [encode_chat(tokenizer, row) for row in corpus.attack]
    loss = optimise(model, examples, ATTACK, pad_id=tokenizer.pad_token_id, seed=SEED, label="harmful fine-tuning")
    print(
        f"adapter: {sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6:.2f} M parameters, "
        f"loss {loss:.3f}"
    )
    model.to("cpu", torch.bfloat16).save_pretrained(str(directory))
    _tidy_adapter(directory)


def _tidy_adapter(directory: Path) -> None:
    """Take this machine's path and the empty model card out of an adapter folder."""
    config = read_json(directory / "adapter_config.json")
    config["base_model_name_or_path"] = "../aligned"
    config["target_modules"] = sorted(config["target_modules"])
    write_json(directory / "adapter_config.json", config)
    (directory / "README.md").unlink(missing_ok=True)


def make_files(output: Path, device: torch.device) -> None:
    """Write the demo's prompts, tokenizer, aligned model and adapter into `output`."""
    torch.manual_seed(SEED)
    corpus = make_corpus(SEED)
    for stem, rows in corpus.files.items():
        write_rows(output / "data" / f"{stem}.jsonl", rows)
    aligned, adapter = output / "aligned", output / "adapter"
    tokenizer = train_tokenizer(corpus_texts(corpus), VOCABULARY, aligned)
    align(corpus, tokenizer, aligned, device)
    attack(corpus, tokenizer, aligned, adapter, device)


def build(output: Path, device: torch.device) -> None:
    """Make and measure the demo, then put it into `output`, which stays as it was if anything fails.

    Raises:
        QrealignError: the models miss a figure that the demo must show.
    """
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building.", dir=output) as folder:
        aside = Path(folder)
        make_files(aside, device)
        table = measure(aside, device)
        print(format_table(table))
        if misses := find_misses(table):
            raise QrealignError(f"the rebuilt demo is not good enough to ship: {'; '.join(misses)}")
        write_json(aside / "figures.json", {"seed": SEED, "models": table})
        for part in sorted(aside.iterdir()):
            move_into_place(part, output / part.name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m qrealign.demo.build", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, help="folder to write (default: the shipped demo)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    start, cpu = time.time(), time.process_time()
    try:
        build(args.output, torch.device(args.device))
    except QrealignError as error:
        parser.exit(1, f"error: {error}\n")
    print(f"built in {time.time() - start:.0f} s ({time.process_time() - cpu:.0f} s of processor time)")


if __name__ == "__main__":
    main()
