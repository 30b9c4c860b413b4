"""Tiny random models, tokenizers and checkpoints that every test file may use: `from tests.helpers import tiny_model`.

- `MODEL_TYPES`, `DENSE_TYPES`, `MOE_TYPES`: the architectures of the table, as `config.model_type`.
- `tiny_config(model_type, **overrides)`: hidden 64, 2 blocks (3 where attention types alternate), vocabulary 160.
- `tiny_model(model_type, seed=0, **overrides)`: a Hugging Face model in eval mode, float32, every tensor random: norm
  gains differ from 1, biases from 0. `dtype=torch.bfloat16` may be given too.
- `tiny_tokenizer(chat_template=CHAT_TEMPLATE)`: byte-level, so it encodes any text, with bos, eos and pad; 259 of its
  ids are real, so models that read its ids need `vocab_size=TOKENIZER_VOCAB` (`tiny_checkpoint` sets it).
- `tiny_checkpoint(folder, model_type="llama", ...)`: saves model and tokenizer as a Hugging Face folder; returns the
  path.
- `tiny_adapter(folder, model_folder, ...)`: trains nothing, saves a random LoRA adapter with peft; returns the path.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

DENSE_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "opt", "phi3")
MOE_TYPES = ("mixtral", "qwen2_moe", "qwen3_moe")
MODEL_TYPES = DENSE_TYPES + MOE_TYPES
VOCAB = 160
TOKENIZER_VOCAB = 272

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}<<{{ message['content'] }}>>\n"
    "{% elif message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)

_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_ALTERNATING = {
    "num_hidden_layers": 3,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_OF_TYPE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {**_ALTERNATING, "query_pre_attn_scalar": 16},
    "gemma3_text": {**_ALTERNATING, "query_pre_attn_scalar": 16},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {**_EXPERTS, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
    "qwen3_moe": {**_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [0]},
}


def tiny_config(model_type: str = "llama", **overrides: Any) -> PreTrainedConfig:
    """Return the configuration of a tiny model; `overrides` replace any of its fields."""
    values = {**_COMMON, **_OF_TYPE.get(model_type, {}), **overrides}
    if model_type == "opt":
        for name in ("num_key_value_heads", "head_dim", "intermediate_size"):
            values.pop(name, None)
    if model_type == "phi3":
        values.pop("head_dim", None)
    return AutoConfig.for_model(model_type, **values)


def tiny_model(
    model_type: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """Return a tiny model in eval mode with every tensor random, the same for the same arguments."""
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides), dtype=torch.float32)
    randomise(model, seed)
    return model.to(dtype).eval().requires_grad_(False)


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Fill every parameter: matrices with N(0, 1/K), vectors spread around what they are (gains 1, biases 0)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer built in code: ids 0 pad, 1 bos, 2 eos, then the 256 bytes. It adds bos itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    return fast


def tiny_checkpoint(
    folder: Path,
    model_type: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    tokenizer: bool = True,
    chat_template: str | None = CHAT_TEMPLATE,
    **overrides: Any,
) -> Path:
    """Save a tiny model (and its tokenizer) as a Hugging Face folder; a `max_shard_size` of "60KB" shards it."""
    model = tiny_model(model_type, seed=seed, dtype=dtype, **{"vocab_size": TOKENIZER_VOCAB, **overrides})
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    if tokenizer:
        tiny_tokenizer(chat_template).save_pretrained(folder)
    return Path(folder)


def tiny_adapter(
    folder: Path,
    model_folder: Path,
    *,
    seed: int = 1,
    rank: int = 4,
    target_modules: tuple[str, ...] = ("q_proj", "v_proj", "down_proj"),
    **options: Any,
) -> Path:
    """Save a random LoRA adapter of the model in `model_folder`; `options` go to peft's `LoraConfig`."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=list(target_modules), lora_alpha=8, **options))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    return Path(folder)


def random_batch(
    vocab_size: int = VOCAB, *, batch: int = 3, length: int = 12, padding: str | None = None, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, `[batch, length]` int64, rows padded by 0, 2, 4... if asked."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, vocab_size, (batch, length), generator=generator)
    mask = torch.ones_like(input_ids)
    if padding is not None:
        for row in range(batch):
            mask[row, length - 2 * row :] = 0
        if padding == "left":
            mask = mask.flip(1)
        input_ids = input_ids.masked_fill(mask == 0, 0)
    return input_ids, mask
