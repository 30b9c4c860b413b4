"""Equivalent transforms (LET): learned channel scales that cancel, and move difficulty between tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qrealign.arch import BlockSpec, FoldSite, Heads, Part, SiteName
from qrealign.quant.fake_quant import FakeQuantLinear

DEFAULT_SITES: tuple[SiteName, ...] = ("norm_to_qkv", "v_to_out", "q_to_k", "norm_to_mlp")
_MIN_SCALE = 1e-2  # learned scales start no smaller, so that a dead channel does not blow up its weights
_MAX_SCALE = 1e2
_MIN_STATISTIC = 1e-5


@dataclass(frozen=True)
class _Spread:
    """Which learned value each row or column of a tensor takes.

    `index` is `[rows]` int64; `ties`, `[size, most]`, holds the rows of each value, filled up with `rows`, or is None
    where values and rows are one to one and in order.
    """

    index: Tensor
    ties: Tensor | None

    @classmethod
    def of(cls, index: Tensor, size: int, device: torch.device) -> _Spread:
        """Work out the ties of an index on the host and put both on `device`."""
        if torch.equal(index, torch.arange(size)):
            return cls(index.to(device), None)
        counts = torch.bincount(index, minlength=size)
        value, order = index.sort(stable=True)
        ties = torch.full((size, int(counts.max())), len(index))
        ties[value, torch.arange(len(index)) - (counts.cumsum(0) - counts)[value]] = order
        return cls(index.to(device), ties.to(device))

    def __call__(self, values: Tensor) -> Tensor:
        """Return `values[index]`, with autograd."""
        return values if self.ties is None else _SpreadFunction.apply(values, self.index, self.ties)


class _SpreadFunction(torch.autograd.Function):
    """`values[index]` whose backward adds up ties in a fixed order; torch's own sorts the index in every step."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, index: Tensor, ties: Tensor) -> Tensor:
        ctx.save_for_backward(ties)
        return values[index]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (ties,) = ctx.saved_tensors
        return F.pad(grad, (0, 1))[ties].sum(dim=1), None, None


class _Site(NamedTuple):
    """A fold site of one block, resolved.

    `producer_spread` maps rows of the producer's part to learned values, `consumer_spread` maps the consumers' columns
    (for `q_to_k`: the rows of the key part) to them; a slice says which rows of a linear are meant.
    """

    name: SiteName
    producer: str
    consumers: tuple[str, ...]
    size: int
    producer_spread: _Spread
    consumer_spread: _Spread
    producer_rows: slice
    consumer_rows: slice


class EquivalentTransform(nn.Module):
    """Positive scales at the fold sites of one block: the producer is divided by them, the consumers are multiplied.

    The block's linears must be `FakeQuantLinear`s. While training nothing is rewritten: `refresh` hands every linear
    the vectors it needs, and a norm its divided gain, with autograd, in the place of the parameter. `fold` then writes
    the scales into norms and weights, after which the block computes the same without a transform.

    Attributes:
        log_scale: site key -> learned natural logarithm of the scales, float32; keys are the site names, numbered from
            the second site of a name on. Tied channels share a value: key-value heads over their query group, and RoPE
            partners j and j + rotary / 2.

    Args:
        block: a decoder block whose linears have been swapped. It is not registered as a submodule.
        spec: the block's architecture. Sites whose modules the block lacks are passed over.
        sites: names of the sites to use. `up_to_down` is exact as well, but left out unless asked for: OmniQuant found
            its gradients unstable.

    Source: OmniQuant, arXiv 2308.13137, section 3.3; rules for grouped heads and RoPE derived in this project.
    """

    def __init__(self, block: nn.Module, spec: BlockSpec, *, sites: Collection[str] = DEFAULT_SITES) -> None:
        super().__init__()
        self._block = (block,)  # in a tuple, so that the block's parameters are not ours
        self._offset = spec.norm_weight_offset
        self._sites: dict[str, _Site] = {}
        self._replaced: dict[tuple[nn.Module, str], nn.Parameter] = {}  # of norms, while attached
        device = next((parameter.device for parameter in block.parameters()), torch.device("cpu"))
        for site in spec.sites:
            if site.name in sites and _has_modules(block, site):
                self._sites[_unique_key(site.name, self._sites)] = _resolve(block, site, spec.heads, device)
        self.log_scale = nn.ParameterDict(
            {key: nn.Parameter(torch.zeros(site.size, device=device)) for key, site in self._sites.items()}
        )

    @torch.no_grad()
    def init_from(self, activation_amax: Mapping[str, Tensor], alpha: float = 0.5) -> None:
        """Start every scale at `a^alpha / w^(1 - alpha)`, with a and w the largest input and weight of each channel.

        Args:
            activation_amax: linear's name in the block -> `[K]` float, largest absolute input per channel. A site whose
                consumer is missing keeps its value. `q_to_k` always starts at 1.
            alpha: how much of the activations' spread moves into the weights.
        """
        for key, site in self._sites.items():
            amax = activation_amax.get(site.consumers[0])
            if site.name == "q_to_k" or amax is None:
                continue
            log_scale = self.log_scale[key]
            maxima = [self._linear(name).weight.float().abs().amax(dim=0) for name in site.consumers]
            w = _reduce_max(torch.stack(maxima).amax(dim=0), site)
            a = _reduce_max(amax.float().to(log_scale.device), site)
            log_scale.copy_((a**alpha / w ** (1 - alpha)).clamp(_MIN_SCALE, _MAX_SCALE).log())

    def scales(self) -> dict[str, Tensor]:
        """Return the learned scales by site key, float32, with autograd."""
        return {key: parameter.exp() for key, parameter in self.log_scale.items()}

    def attach(self) -> None:
        """Let the block compute with the transform; the same as `refresh`."""
        self.refresh()

    def refresh(self) -> None:
        """Hand the linears the vectors of the current scales; call it before every forward pass with gradients."""
        self._clear()
        for key, site in self._sites.items():
            scale = self.log_scale[key].exp()
            divisor, factor = site.producer_spread(scale), site.consumer_spread(scale)
            if site.name == "q_to_k":
                self._divide_rows(site.producer, site.producer_rows, divisor)
                self._divide_rows(site.consumers[0], site.consumer_rows, 1 / factor)
                continue
            for name in site.consumers:
                self._linear(name).column_scale = factor
            if site.name.startswith("norm"):
                self._divide_norm(site.producer, divisor)
            else:
                self._divide_rows(site.producer, site.producer_rows, divisor)

    @torch.no_grad()
    def fold(self, storage_dtype: torch.dtype | None = None) -> None:
        """Write the scales into norms and linears, in place and in float32, and detach the transform.

        Args:
            storage_dtype: norm gains and biases stay in floating point in the checkpoint: they are rounded to this
                dtype, so that the block computes with what is stored. Weights of linears are about to be quantized:
                they become float32, so that their codes are those of the last training step.
        """
        self.refresh()
        divided = {place: getattr(*place) for place in self._replaced}
        for name in {name for site in self._sites.values() for name in (*site.consumers, site.producer)}:
            module = self._module(name)
            if isinstance(module, FakeQuantLinear):
                bias = module.float_bias()
                edit, module.edit = module.edit, None
                module.weight = nn.Parameter(module.float_weight(), requires_grad=module.weight.requires_grad)
                module.edit = edit
                if module.bias is not None and bias is not None:
                    module.bias.copy_(_rounded(bias, storage_dtype))
                    module.bias_edit = None  # it is in the bias now
        self._clear()
        for (norm, leaf), tensor in divided.items():
            norm.get_parameter(leaf).copy_(_rounded(tensor, storage_dtype))

    def detach(self) -> None:
        """Let the block compute without the transform, unfolded."""
        self._clear()

    def _clear(self) -> None:
        """Remove the vectors from every linear of the block, and give the norms their parameters back."""
        for module in self._block[0].modules():
            if isinstance(module, FakeQuantLinear):
                module.column_scale = module.row_divisor = None
        for (norm, leaf), parameter in self._replaced.items():
            delattr(norm, leaf)
            norm.register_parameter(leaf, parameter)
        self._replaced.clear()

    def _divide_norm(self, name: str, divisor: Tensor) -> None:
        """Let a norm compute with its gain (`offset + weight`) and bias divided."""
        norm = self._module(name)
        for leaf, offset in (("weight", self._offset), ("bias", 0)):
            parameter = norm._parameters.pop(leaf, None)
            if parameter is not None:
                self._replaced[norm, leaf] = parameter
                setattr(norm, leaf, ((parameter.float() + offset) / divisor - offset).to(parameter.dtype))

    def _divide_rows(self, name: str, rows: slice, divisor: Tensor) -> None:
        """Divide some rows of a linear by `divisor`; the sites of a fused linear each add their part."""
        linear = self._linear(name)
        if rows == slice(0, linear.out_features) and linear.row_divisor is None:
            linear.row_divisor = divisor
            return
        start, stop, _ = rows.indices(linear.out_features)
        full = divisor.new_ones(linear.out_features) if linear.row_divisor is None else linear.row_divisor
        linear.row_divisor = torch.cat([full[:start], full[start:stop] * divisor, full[stop:]])

    def _module(self, name: str) -> nn.Module:
        """Return a submodule of the block."""
        return self._block[0].get_submodule(name)

    def _linear(self, name: str) -> FakeQuantLinear:
        """Return a swapped linear of the block."""
        linear = self._module(name)
        if not isinstance(linear, FakeQuantLinear):
            raise TypeError(
                f"{name} is a {type(linear).__name__}: swap the block's linears before building a transform"
            )
        return linear


def _has_modules(block: nn.Module, site: FoldSite) -> bool:
    """Tell whether a block has every module of a site."""
    names = {name for name, _ in block.named_modules()}
    return names.issuperset((site.producer, *site.consumers))


def _unique_key(name: str, taken: Collection[str]) -> str:
    """Return `name`, with a number behind it if it is taken."""
    count = sum(key.startswith(name) for key in taken)
    return name if count == 0 else f"{name}_{count + 1}"


def _resolve(block: nn.Module, site: FoldSite, heads: Heads | None, device: torch.device) -> _Site:
    """Work out how many values a site learns and which rows and columns they belong to."""
    assert heads is not None  # every row of the table with sites has them
    producer, consumer = block.get_submodule(site.producer), block.get_submodule(site.consumers[0])
    producer_rows = consumer_rows = slice(0, None)
    if not site.name.startswith("norm"):
        producer_rows = _rows(site.producer_part, producer, heads)
    if site.name == "q_to_k":
        producer_index, consumer_index, size = _query_key_index(heads)
        consumer_rows = _rows(site.consumer_part, consumer, heads)
    elif site.name == "v_to_out":
        size = heads.key_value * heads.size
        producer_index = torch.arange(size)
        per_head = producer_index.reshape(heads.key_value, heads.size)
        consumer_index = per_head.repeat_interleave(heads.query // heads.key_value, dim=0).flatten()
    else:
        size = _weight(consumer).shape[1]
        producer_index = consumer_index = torch.arange(size)
    producer_spread, consumer_spread = (_Spread.of(index, size, device) for index in (producer_index, consumer_index))
    return _Site(
        site.name, site.producer, site.consumers, size, producer_spread, consumer_spread, producer_rows, consumer_rows
    )


def _query_key_index(heads: Heads) -> tuple[Tensor, Tensor, int]:
    """Return, for the query rows and the key rows, the learned value of each, and the number of values.

    RoPE turns channels j and j + rotary / 2 into each other, so both share one value; channels behind `rotary` are
    free.
    """
    half = heads.rotary // 2
    turned = torch.arange(half).repeat(2)
    channel = torch.cat([turned, half + torch.arange(heads.size - 2 * half)])  # [head size] -> value within a head
    per_head = heads.size - half
    key = torch.arange(heads.key_value)[:, None] * per_head + channel  # [key-value heads, head size]
    query = key.repeat_interleave(heads.query // heads.key_value, dim=0)
    return query.flatten(), key.flatten(), heads.key_value * per_head


def _rows(part: Part | None, linear: nn.Module, heads: Heads) -> slice:
    """Return the rows of a (fused) linear that a part names."""
    rows = _weight(linear).shape[0]
    if part is None:
        return slice(0, rows)
    if part == "up":
        return slice(rows // 2, rows)
    query, key_value = heads.query * heads.size, heads.key_value * heads.size
    start = {"q": 0, "k": query, "v": query + key_value}[part]
    return slice(start, start + (query if part == "q" else key_value))


def _reduce_max(channel: Tensor, site: _Site) -> Tensor:
    """Return the largest value among the consumer channels that share a learned value, `[size]`."""
    index = site.consumer_spread.index.to(channel.device)
    return channel.new_zeros(site.size).scatter_reduce(0, index, channel, "amax").clamp(min=_MIN_STATISTIC)


def _weight(module: nn.Module) -> Tensor:
    """Return a module's weight."""
    return module.get_parameter("weight")


def _rounded(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return `tensor` rounded to `dtype`, in its own dtype."""
    return tensor if dtype is None else tensor.to(dtype).to(tensor.dtype)
