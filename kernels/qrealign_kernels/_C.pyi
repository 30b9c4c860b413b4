"""Stub of the compiled extension: `cpu.py` is its only caller. Tensors cross as addresses of contiguous memory."""

def isa() -> str: ...
def fake_quant_weight(
    rows: int,
    low_share: int,
    high_share: int,
    fake: int,
    grid: int,
    row_count: int,
    columns: int,
    num_bits: int,
    symmetric: bool,
    scale_kind: int,
    threads: int,
    /,
) -> None: ...
def weight_gradient_sums(
    grad: int,
    rows: int,
    grid: int,
    sums: int,
    row_count: int,
    columns: int,
    num_bits: int,
    symmetric: bool,
    threads: int,
    /,
) -> None: ...
def weight_gradient_rows(
    grad: int,
    rows: int,
    grid: int,
    at_minimum: int,
    at_maximum: int,
    result: int,
    row_count: int,
    columns: int,
    threads: int,
    /,
) -> None: ...
def fake_quant_per_token(x: int, fake: int, row_count: int, columns: int, num_bits: int, threads: int, /) -> None: ...
def quantize_per_token(
    x: int, codes: int, scale: int, row_count: int, columns: int, num_bits: int, threads: int, /
) -> None: ...
def pack_codes(codes: int, packed: int, row_count: int, columns: int, num_bits: int, threads: int, /) -> None: ...
def unpack_codes(packed: int, codes: int, row_count: int, columns: int, num_bits: int, threads: int, /) -> None: ...
def linear_isa(isa: str, /) -> str: ...
def integer_linear(
    isa: str,
    token_kind: int,
    x: int,
    x_scale: int,
    token_bits: int,
    tokens: int,
    codes: int,
    scale: int,
    zero_point: int,
    rows: int,
    columns: int,
    groups: int,
    quads: int,
    num_bits: int,
    bias: int,
    out: int,
    bfloat16: bool,
    threads: int,
    /,
) -> None: ...
def float_linear(
    isa: str,
    x: int,
    tokens: int,
    codes: int,
    scale: int,
    zero_point: int,
    rows: int,
    columns: int,
    groups: int,
    quads: int,
    num_bits: int,
    bias: int,
    out: int,
    bfloat16: bool,
    threads: int,
    /,
) -> None: ...
