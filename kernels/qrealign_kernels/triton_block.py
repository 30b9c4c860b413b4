"""Triton kernels of a decoder block beside its products: norm behind a sum, gate, attention of one new token.

What they move is small, so a step has as few launches as possible, and each starts while the one in front of it ends.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qrealign_kernels import launches, reference_block
from qrealign_kernels.reference_block import normed_dtype
from qrealign_kernels.triton_activations import FEW_TOKENS, as_rows, code_constants, store_tokens, token_tile
from qrealign_kernels.triton_common import LARGEST_WIDTH, on_device_of
from qrealign_kernels.triton_math import FLOAT_KINDS, FP_FUSION, INTERPRETED, convert, exponential, round_to
from qrealign_kernels.triton_overlap import overlap, wait_for_inputs

MOST_HEADS = 64  # of queries that share a key: their scores with a tile of keys are held at once
_LEAST_ROWS = 16  # of a tile for the tensor cores; the memory sets the pace, so that empty rows cost nothing

_ROW_BYTES = 256  # of the heads that the launch table is for: tiles of wider ones hold fewer cells


@triton.jit
def _add_rms_norm_fwd_kernel(
    x_ptr, branch_ptr, weight_ptr, sum_ptr, out_ptr, scale_ptr, R, C, stride_xr, stride_br, eps, offset,
    HAS_BRANCH: tl.constexpr, WEIGHT_LAST: tl.constexpr, X_KIND: tl.constexpr, OUT_KIND: tl.constexpr,
    CODES: tl.constexpr, QMIN: tl.constexpr, QMAX: tl.constexpr, ZERO_SCALE: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add, normalize, and with CODES quantize what comes of it."""
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < C
    m_r = r < R
    mask = m_r[:, None] & m_c[None, :]
    b_weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    wait_for_inputs(OVERLAP)
    b_x = tl.load(x_ptr + r[:, None] * stride_xr + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
    offsets = r[:, None] * C + o_c[None, :]
    if HAS_BRANCH:
        b_branch = tl.load(branch_ptr + r[:, None] * stride_br + o_c[None, :], mask=mask, other=0.0).to(tl.float32)
        b_x = round_to(b_x + b_branch, X_KIND)
        tl.store(sum_ptr + offsets, convert(b_x, sum_ptr.dtype.element_ty), mask=mask)
    mean_square = tl.div_rn(tl.sum(b_x * b_x, axis=1), C.to(tl.float32))
    b_y = b_x * tl.rsqrt(mean_square + eps)[:, None]
    b_y = round_to(b_y, X_KIND) * b_weight[None, :] if WEIGHT_LAST else b_y * (offset + b_weight)[None, :]
    b_y = round_to(b_y, OUT_KIND)
    if CODES:
        store_tokens(b_y, out_ptr, scale_ptr, r, o_c, m_r, mask, C, CODES, QMIN, QMAX, ZERO_SCALE)
    else:
        tl.store(out_ptr + offsets, convert(b_y, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _silu_mul_fwd_kernel(
    gate_ptr, up_ptr, out_ptr, C, stride_gr, stride_ur, KIND: tl.constexpr, OVERLAP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    wait_for_inputs(OVERLAP)
    r = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = o_c < C
    b_gate = tl.load(gate_ptr + r * stride_gr + o_c, mask=mask, other=0.0).to(tl.float32)
    b_up = tl.load(up_ptr + r * stride_ur + o_c, mask=mask, other=0.0).to(tl.float32)
    b_y = round_to(tl.div_rn(b_gate, 1.0 + exponential(-b_gate)), KIND) * b_up
    tl.store(out_ptr + r * C + o_c, convert(round_to(b_y, KIND), out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rotated(x_ptr, offsets, o_d, b_cos, b_sin, mask, D: tl.constexpr, KIND: tl.constexpr):
    """Return heads `[H, D]` at `offsets` `[H, 1]`, turned as `reference_block.rotate_ref` does."""
    partner = tl.where(o_d < D // 2, o_d + D // 2, o_d - D // 2)
    b_x = tl.load(x_ptr + offsets + o_d[None, :], mask=mask, other=0.0).to(tl.float32)
    b_other = tl.load(x_ptr + offsets + partner[None, :], mask=mask, other=0.0).to(tl.float32)
    b_other = tl.where((o_d < D // 2)[None, :], -b_other, b_other)
    return round_to(round_to(b_x * b_cos[None, :], KIND) + round_to(b_other * b_sin[None, :], KIND), KIND)


@triton.jit
def _product(a, b):
    if INTERPRETED:  # it multiplies the bits of bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _decode_attention_fwd_kernel(
    query_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, keys_ptr, values_ptr, cells_ptr, mask_ptr,
    part_ptr, top_ptr, sum_ptr, length, scaling, stride_qb, stride_kb, stride_vb, stride_cosb, stride_sinb,
    stride_keysb, stride_keysh, stride_keyss, stride_valuesb, stride_valuesh, stride_valuess, stride_cb, stride_mb,
    HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    HAS_MASK: tl.constexpr, KIND: tl.constexpr, OVERLAP: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Attend from the query heads of one key head to one of SPLITS runs of its row's cells.

    The first run holds the new token too, whose key and value it stores: no program reads what another one writes.
    Leaves the weighted values, and the maximum and the sum of the weights, in float32. Weights meet the values in the
    buffers' dtype, as in the attention of libraries.
    """
    b = (tl.program_id(0) // HEADS).to(tl.int64)
    h = (tl.program_id(0) % HEADS).to(tl.int64)  # times a stride: long buffers of many heads pass 2**31
    split = tl.program_id(1)
    o_d, o_g = tl.arange(0, DP), tl.arange(0, GROUP_P)
    m_d = o_d < D
    m_q = (o_g < GROUP)[:, None] & m_d[None, :]
    wait_for_inputs(OVERLAP)
    cell = tl.load(cells_ptr + b * stride_cb)
    b_cos = tl.load(cos_ptr + b * stride_cosb + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_sin = tl.load(sin_ptr + b * stride_sinb + o_d, mask=m_d, other=0.0).to(tl.float32)
    heads = b * stride_qb + (h * GROUP + o_g)[:, None] * D
    b_query = _rotated(query_ptr, heads, o_d, b_cos, b_sin, m_q, D, KIND)  # [GROUP_P, DP]
    keys_ptr += b * stride_keysb + h * stride_keysh
    values_ptr += b * stride_valuesb + h * stride_valuesh
    top = tl.full([GROUP_P], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_P], tl.float32)
    acc = tl.zeros([GROUP_P, DP], tl.float32)
    element = keys_ptr.dtype.element_ty
    if split == 0:
        one = tl.zeros([1, 1], tl.int64)
        b_key = _rotated(key_ptr, b * stride_kb + h * D + one, o_d, b_cos, b_sin, m_d[None, :], D, KIND)  # [1, DP]
        b_value = tl.load(value_ptr + b * stride_vb + h * D + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
        tl.store(keys_ptr + cell * stride_keyss + o_d[None, :], convert(b_key, element), mask=m_d[None, :])
        tl.store(values_ptr + cell * stride_valuess + o_d[None, :], convert(b_value, element), mask=m_d[None, :])
        top = tl.sum(b_query * b_key, axis=1) * scaling
        total += 1.0
        acc += b_value
    end = tl.minimum(cell, length).to(tl.int32)
    run = tl.cdiv(tl.cdiv(end, SPLITS), BLOCK_S) * BLOCK_S
    last = tl.minimum((split + 1) * run, end)
    b_query = convert(b_query, element)
    for start in range(split * run, last, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        m_s = o_s < last
        m_kv = m_s[:, None] & m_d[None, :]
        places = o_s.to(tl.int64)[:, None]
        b_keys = tl.load(keys_ptr + places * stride_keyss + o_d[None, :], mask=m_kv, other=0.0)
        b_values = tl.load(values_ptr + places * stride_valuess + o_d[None, :], mask=m_kv, other=0.0)
        if HAS_MASK:
            m_s = tl.load(mask_ptr + b * stride_mb + o_s, mask=m_s, other=0) != 0
        scores = _product(b_query, tl.trans(b_keys)) * scaling  # [GROUP_P, BLOCK_S]
        scores = tl.where(m_s[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)  # nothing was seen yet: all weights are 0
        shrink = tl.exp(top - anchor)
        weights = tl.exp(scores - anchor[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        acc = acc * shrink[:, None] + _product(convert(weights, element), b_values)
        top = higher
    part = (tl.program_id(0) * GROUP + o_g) * SPLITS + split  # [GROUP_P], of [B, query heads, SPLITS]
    tl.store(part_ptr + part.to(tl.int64)[:, None] * D + o_d[None, :], acc, mask=m_q)
    tl.store(top_ptr + part, top, mask=o_g < GROUP)
    tl.store(sum_ptr + part, total, mask=o_g < GROUP)


@triton.jit
def _join_attention_fwd_kernel(
    part_ptr, top_ptr, sum_ptr, out_ptr, cells_ptr,
    D: tl.constexpr, DP: tl.constexpr, ADVANCE: tl.constexpr, OVERLAP: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Put the runs of one query head together; the first program moves the cell on, which nothing reads any more."""
    wait_for_inputs(OVERLAP)
    head = tl.program_id(0).to(tl.int64)
    o_d, o_s = tl.arange(0, DP), tl.arange(0, SPLITS)
    m_d = o_d < D
    tops = tl.load(top_ptr + head * SPLITS + o_s)
    weights = tl.exp(tops - tl.max(tops, axis=0))
    total = tl.sum(weights * tl.load(sum_ptr + head * SPLITS + o_s), axis=0)
    parts = tl.load(part_ptr + (head * SPLITS + o_s)[:, None] * D + o_d[None, :], mask=m_d[None, :], other=0.0)
    b_out = tl.sum(parts * weights[:, None], axis=0) / total
    tl.store(out_ptr + head * D + o_d, convert(b_out, out_ptr.dtype.element_ty), mask=m_d)
    if ADVANCE:
        tl.store(cells_ptr, tl.load(cells_ptr) + 1, mask=head == 0)


def add_rms_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, *, offset: float
) -> tuple[Tensor, Tensor]:
    """Compute `reference_block.add_rms_norm_ref`."""
    if x.shape[-1] > LARGEST_WIDTH or x.numel() == 0:
        return reference_block.add_rms_norm_ref(x, branch, weight, eps, offset=offset)
    out = torch.empty(x.shape, dtype=normed_dtype(x, weight, offset), device=x.device)
    return _sum_tokens(x, branch, weight, eps, offset, out, None, 8), out


def add_rms_norm_quantize(
    x: Tensor, branch: Tensor, weight: Tensor, eps: float, *, offset: float, num_bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `reference_block.add_rms_norm_quantize_ref`."""
    if x.shape[-1] > LARGEST_WIDTH or x.numel() == 0:
        return reference_block.add_rms_norm_quantize_ref(x, branch, weight, eps, offset=offset, num_bits=num_bits)
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    return _sum_tokens(x, branch, weight, eps, offset, codes, scale, num_bits), codes, scale


def _sum_tokens(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    eps: float,
    offset: float,
    out: Tensor,
    scale: Tensor | None,
    num_bits: int,
) -> Tensor:
    """Fill `out` with the normalized sum, or with its codes where there is a scale to fill too; return the sum."""
    rows, branches = as_rows(x), as_rows(x if branch is None else branch)
    total = x if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = token_tile("rms_norm_quantize", rows)  # it moves what that kernel moves
    with on_device_of(x):
        _add_rms_norm_fwd_kernel[(triton.cdiv(rows.shape[0], tile["BLOCK_R"]),)](
            rows,
            branches,
            weight.contiguous(),
            total,
            out,
            out if scale is None else scale,
            *rows.shape,
            rows.stride(0),
            branches.stride(0),
            eps,
            offset,
            HAS_BRANCH=branch is not None,
            WEIGHT_LAST=offset == 0.0,
            X_KIND=FLOAT_KINDS[x.dtype],
            OUT_KIND=FLOAT_KINDS[normed_dtype(x, weight, offset)],
            **code_constants(num_bits, x.device, codes=scale is not None),
            **tile,
        )
    return total


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Compute `reference_calibration.silu_mul_ref`."""
    gates, ups = as_rows(gate), as_rows(up)
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if out.numel():
        choice = launches.choice("silu_mul", "few" if len(gates) <= FEW_TOKENS else launches.DEFAULT, gate.device)
        with on_device_of(gate):
            _silu_mul_fwd_kernel[(len(gates), triton.cdiv(gates.shape[1], choice["BLOCK_C"]))](
                gates,
                ups,
                out,
                gates.shape[1],
                gates.stride(0),
                ups.stride(0),
                KIND=FLOAT_KINDS[gate.dtype],
                enable_fp_fusion=FP_FUSION,
                **overlap(gate.device),
                **choice,
            )
    return out


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    cells: Tensor,
    mask: Tensor | None,
    *,
    length: int,
    scaling: float,
    advance: bool,
) -> Tensor:
    """Compute `reference_block.decode_attention_ref`."""
    batch, heads, size = query.shape
    groups = key.shape[1]
    if heads // groups > MOST_HEADS or batch == 0:
        return reference_block.decode_attention_ref(
            query, key, value, cos, sin, keys, values, cells, mask, length=length, scaling=scaling, advance=advance
        )
    query, key, value = (_heads_together(states) for states in (query, key, value))
    choice = dict(launches.choice("decode_attention", f"p{triton.next_power_of_2(batch * groups)}", query.device))
    splits, padded = choice["SPLITS"], max(_LEAST_ROWS, triton.next_power_of_2(size))
    wider = padded * query.element_size() / _ROW_BYTES
    choice["BLOCK_S"] = max(_LEAST_ROWS, int(choice["BLOCK_S"] / max(1, wider)))
    part = torch.empty(batch * heads * splits, size, dtype=torch.float32, device=query.device)
    top, total = torch.empty(2, batch * heads * splits, dtype=torch.float32, device=query.device)
    out = torch.empty(batch, heads, size, dtype=query.dtype, device=query.device)
    shape = {"D": size, "DP": padded}
    with on_device_of(query):
        _decode_attention_fwd_kernel[(batch * groups, splits)](
            query,
            key,
            value,
            cos,
            sin,
            keys,
            values,
            cells,
            cells if mask is None else mask,
            part,
            top,
            total,
            length,
            scaling,
            query.stride(0),
            key.stride(0),
            value.stride(0),
            cos.stride(0),
            sin.stride(0),
            *keys.stride()[:3],
            *values.stride()[:3],
            0 if len(cells) == 1 else cells.stride(0),
            0 if mask is None else mask.stride(0),
            HEADS=groups,
            GROUP=heads // groups,
            GROUP_P=max(_LEAST_ROWS, triton.next_power_of_2(heads // groups)),
            HAS_MASK=mask is not None,
            KIND=FLOAT_KINDS[query.dtype],
            enable_fp_fusion=FP_FUSION,
            **shape,
            **overlap(query.device),
            **choice,
        )
        _join_attention_fwd_kernel[(batch * heads,)](
            part, top, total, out, cells, ADVANCE=advance, SPLITS=splits, **shape, **overlap(query.device),
            **launches.choice("join_attention", launches.DEFAULT, query.device),
        )  # fmt: skip
    return out


def _heads_together(states: Tensor) -> Tensor:
    """Return `[B, H, D]` whose heads lie one behind the other in every row: a view where they do."""
    return states if states.stride()[1:] == (states.shape[2], 1) else states.contiguous()
