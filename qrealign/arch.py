"""What differs between architectures, as rows of a table: where blocks are and where channel scales can be folded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from qrealign.errors import UnsupportedArchitectureError

SiteName = Literal["norm_to_qkv", "v_to_out", "q_to_k", "norm_to_mlp", "up_to_down"]
Part = Literal["q", "k", "v", "up"]


@dataclass(frozen=True, kw_only=True)
class Heads:
    """Attention geometry: query heads, key-value heads, channels per head and how many of them RoPE turns (0: no RoPE).

    RoPE is in the split-half layout of Hugging Face: channel j turns together with j + rotary / 2.
    """

    query: int
    key_value: int
    size: int
    rotary: int


@dataclass(frozen=True)
class FoldSite:
    """One place where positive channel scales change no output: what the producer is divided by, the consumers
    multiply.

    `producer` is a norm (`norm_to_*`) or a linear whose rows are divided. The consumers' columns are multiplied, except
    for `q_to_k`, where the key rows are. A part names the rows of a fused linear (`qkv_proj`, `gate_up_proj`).
    """

    name: SiteName
    producer: str
    consumers: tuple[str, ...]
    producer_part: Part | None = None
    consumer_part: Part | None = None


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """What the pipeline must know of one architecture; module names are relative to a block unless they hold a path.

    Attributes:
        model_type: key of the table, `config.model_type`.
        blocks: path of the list of decoder blocks in the model.
        final_norm: path of the norm behind the last block, or "" where none was found.
        sites: equivalent transforms on offer; a site whose modules a block lacks is passed over (dense and sparse
            blocks mix).
        norm_weight_offset: 1 where a norm multiplies by `1 + weight`.
        skip: name endings of linears that are never quantized (routers and gates of experts).
        fused: leaf names of sibling linears that servers fuse into one, so they share scheme and fate.
        experts: path of the fused experts module in a block, "" where there is none.
        expert_linears: leaf names of an expert's gate, up and down linears, as checkpoints call them.
        renames: pairs (text in our tensor names, text in the checkpoint's).
        heads: attention geometry, filled in from the configuration.
        plain_steps: a block is norm, attention behind rotary embeddings, norm and gated MLP, both added to the residual
            stream, under the names of Llama's, and nothing else.
        known: False for an architecture that is no row of the table (no transforms then, clipping only).
    """

    model_type: str
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    sites: tuple[FoldSite, ...] = ()
    norm_weight_offset: int = 0
    skip: tuple[str, ...] = (".gate", ".router", "shared_expert_gate")
    fused: tuple[tuple[str, ...], ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
    experts: str = ""
    expert_linears: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    renames: tuple[tuple[str, str], ...] = ()
    heads: Heads | None = None
    plain_steps: bool = False
    known: bool = True

    def block_name(self, index: int) -> str:
        """Return the path of block `index`, as in tensor names."""
        return f"{self.blocks}.{index}"

    def blocks_of(self, model: Any) -> list[Any]:
        """Return the decoder blocks of a model."""
        return list(model.get_submodule(self.blocks))

    def is_skipped(self, linear: str) -> bool:
        """Tell whether a linear with this name stays unquantized."""
        return f".{linear}".endswith(self.skip)

    def fused_groups(self, linears: Iterable[str]) -> list[tuple[str, ...]]:
        """Return the groups of `linears` (any full names) that servers fuse; only groups that are complete."""
        names = set(linears)
        groups = []
        for name in sorted(names):
            parent, dot, leaf = name.rpartition(".")
            for leaves in self.fused:
                group = tuple(f"{parent}{dot}{other}" for other in leaves)
                if leaf == leaves[0] and names.issuperset(group):
                    groups.append(group)
        return groups


_NORM_TO_QKV = FoldSite("norm_to_qkv", "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
_V_TO_OUT = FoldSite("v_to_out", "self_attn.v_proj", ("self_attn.o_proj",))
_Q_TO_K = FoldSite("q_to_k", "self_attn.q_proj", ("self_attn.k_proj",))
_NORM_TO_MLP = FoldSite("norm_to_mlp", "post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))
_UP_TO_DOWN = FoldSite("up_to_down", "mlp.up_proj", ("mlp.down_proj",))
_SHARED_UP_TO_DOWN = FoldSite("up_to_down", "mlp.shared_expert.up_proj", ("mlp.shared_expert.down_proj",))
_GEMMA_NORM_TO_MLP = replace(_NORM_TO_MLP, producer="pre_feedforward_layernorm")

_LLAMA_SITES = (_NORM_TO_QKV, _V_TO_OUT, _Q_TO_K, _NORM_TO_MLP, _UP_TO_DOWN)
# A norm on queries and keys undoes any row scale in front of it. Folded into that norm's gain instead, a q-to-k scale
# would touch no quantized tensor (neither weights nor inputs of linears), so it could not help and is not offered.
_QK_NORM_SITES = (_NORM_TO_QKV, _V_TO_OUT, _NORM_TO_MLP, _UP_TO_DOWN)

_ROWS = (
    BlockSpec(model_type="llama", sites=_LLAMA_SITES, plain_steps=True),
    BlockSpec(model_type="mistral", sites=_LLAMA_SITES, plain_steps=True),
    BlockSpec(model_type="qwen2", sites=_LLAMA_SITES, plain_steps=True),
    BlockSpec(model_type="qwen3", sites=_QK_NORM_SITES),
    BlockSpec(
        model_type="gemma2",
        norm_weight_offset=1,
        sites=(_NORM_TO_QKV, _V_TO_OUT, _Q_TO_K, _GEMMA_NORM_TO_MLP, _UP_TO_DOWN),
    ),
    BlockSpec(
        model_type="gemma3_text", norm_weight_offset=1, sites=(_NORM_TO_QKV, _V_TO_OUT, _GEMMA_NORM_TO_MLP, _UP_TO_DOWN)
    ),
    BlockSpec(
        model_type="opt",
        blocks="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        sites=(
            replace(_NORM_TO_QKV, producer="self_attn_layer_norm"),
            replace(_V_TO_OUT, consumers=("self_attn.out_proj",)),
            _Q_TO_K,
            FoldSite("norm_to_mlp", "final_layer_norm", ("fc1",)),
            FoldSite("up_to_down", "fc1", ("fc2",)),
        ),
    ),
    BlockSpec(
        model_type="phi3",
        sites=(
            replace(_NORM_TO_QKV, consumers=("self_attn.qkv_proj",)),
            FoldSite("v_to_out", "self_attn.qkv_proj", ("self_attn.o_proj",), producer_part="v"),
            FoldSite("q_to_k", "self_attn.qkv_proj", ("self_attn.qkv_proj",), producer_part="q", consumer_part="k"),
            replace(_NORM_TO_MLP, consumers=("mlp.gate_up_proj",)),
            FoldSite("up_to_down", "mlp.gate_up_proj", ("mlp.down_proj",), producer_part="up"),
        ),
    ),
    # The norm in front of experts also feeds the router, which stays untouched: norm_to_mlp serves dense blocks only.
    BlockSpec(
        model_type="mixtral",
        sites=(_NORM_TO_QKV, _V_TO_OUT, _Q_TO_K),
        experts="mlp.experts",
        expert_linears=("w1", "w3", "w2"),
        renames=((".mlp.", ".block_sparse_moe."),),
    ),
    BlockSpec(model_type="qwen2_moe", sites=(*_LLAMA_SITES, _SHARED_UP_TO_DOWN), experts="mlp.experts"),
    BlockSpec(model_type="qwen3_moe", sites=_QK_NORM_SITES, experts="mlp.experts"),
)
ARCHITECTURES: dict[str, BlockSpec] = {row.model_type: row for row in _ROWS}


def block_spec(config: Any, model: Any = None) -> BlockSpec:
    """Return the row of `config.model_type`, with its attention geometry and the sites that this configuration allows.

    Args:
        config: a Hugging Face text configuration.
        model: the model, needed only for an architecture that is no row of the table: its list of blocks is then looked
            for.

    Raises:
        UnsupportedArchitectureError: the type is unknown and no list of blocks can be found.
    """
    row = ARCHITECTURES.get(config.model_type)
    if row is None:
        return _discover(config, model)
    return replace(row, heads=_heads(config), sites=tuple(site for site in row.sites if _allowed(site, config)))


def _heads(config: Any) -> Heads:
    """Read the attention geometry of a configuration."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None)
    share = rope.get("partial_rotary_factor") if rope else 0.0
    rotary = int(size * (1.0 if share is None else share))
    key_value = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Heads(query=config.num_attention_heads, key_value=key_value, size=size, rotary=rotary)


def _allowed(site: FoldSite, config: Any) -> bool:
    """Tell whether a configuration leaves a site exact: OPT has variants that break some."""
    if config.model_type != "opt":
        return True
    if site.name in ("norm_to_qkv", "norm_to_mlp"):
        return bool(config.do_layer_norm_before and config.layer_norm_elementwise_affine)
    return site.name != "up_to_down" or config.activation_function == "relu"


def _discover(config: Any, model: Any) -> BlockSpec:
    """Find the list of decoder blocks of an architecture that is no row of the table."""
    depth = getattr(config, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in (model.named_modules() if model is not None else ())
        if type(module).__name__ == "ModuleList"
        and len(module) == depth
        and len({type(child) for child in module}) == 1
    ]
    if not lists:
        raise UnsupportedArchitectureError(
            f"model type {config.model_type!r} is no known architecture and holds no list of {depth} equal blocks: "
            f"use a decoder-only model (known: {', '.join(ARCHITECTURES)})"
        )
    blocks, _ = max(lists, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))
    parent, _, _ = blocks.rpartition(".")
    children = [name for name, _ in model.get_submodule(parent).named_children()]
    norms = [name for name in children if "norm" in name or name in ("ln_f", "ln_out")]
    final_norm = f"{parent}.{norms[-1]}".lstrip(".") if norms else ""
    return BlockSpec(model_type=config.model_type, blocks=blocks, final_norm=final_norm, known=False)
