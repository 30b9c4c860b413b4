"""Experts as separate linears: Hugging Face holds them as fused 3-D parameters, which no linear quantizer sees."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qrealign.arch import BlockSpec


class Expert(nn.Module):
    """One gated expert, `down(act(gate(x)) * up(x))`; its linears carry the checkpoint's names (`gate_proj`, `w1`)."""

    def __init__(self, gate_up: Tensor, down: Tensor, names: tuple[str, str, str], activation: nn.Module) -> None:
        super().__init__()
        self.names = names
        self.activation = activation
        gate, up = gate_up.chunk(2, dim=0)
        for name, weight in zip(names, (gate, up, down), strict=True):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
            linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            setattr(self, name, linear)

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(self.activation(gate(x)) * up(x))


class ExpertList(nn.ModuleList):
    """The experts of one block, with the call of Hugging Face's fused experts module."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs.

        Args:
            hidden_states: `[M, H]` tokens.
            top_k_index: `[M, k]` int64, the chosen experts of each token.
            top_k_weights: `[M, k]`, their weights.

        Returns:
            `[M, H]`, in the dtype of `hidden_states`.
        """
        output = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            token, choice = torch.where(top_k_index == index)
            result = self[index](hidden_states[token]) * top_k_weights[token, choice, None]
            output = output.index_add(0, token, result.to(output.dtype))
        return output


def split_experts(block: nn.Module, spec: BlockSpec) -> None:
    """Replace the fused experts of `block` by an `ExpertList`, in place; a block without experts stays as it is.

    Works on the meta device too, so that weights can be loaded per expert, under the names that checkpoints use.
    """
    if not spec.experts:
        return
    parent_name, _, leaf = spec.experts.rpartition(".")
    parent = block.get_submodule(parent_name)
    fused = getattr(parent, leaf, None)
    if fused is None or isinstance(fused, ExpertList):
        return
    experts = [
        Expert(gate_up, down, spec.expert_linears, fused.act_fn)
        for gate_up, down in zip(fused.gate_up_proj, fused.down_proj, strict=True)
    ]
    setattr(parent, leaf, ExpertList(experts))
