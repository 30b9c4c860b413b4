"""A packed folder as a model that runs: it computes what was calibrated, however it is asked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import qrealign
from qrealign.deploy import blocks, layers
from qrealign.deploy.layers import GatedMLP, JoinedLinears, NormQuantizer, PackedLinear
from qrealign.errors import CheckpointFormatError, DeviceError, ModelError
from qrealign.pack.source import open_packed
from qrealign.pipeline.models import ModelPool
from tests.helpers import random_batch
from tests.unit.deploy_helpers import deployed, greedy
from tests.unit.pack_helpers import fitted, open_tiny, quantized, rewrite, stored_tensors

EXACT = 1e-5  # of the logits' norm: floating point products in another order
CODES = 3e-2  # where activations are codes: another order of sums moves some of them by one


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the distance of two tensors as a share of the second's norm."""
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize(
    "model_type", ["llama", "qwen2", "qwen3", "gemma3_text", "opt", "phi3", "mixtral", "qwen2_moe"]
)
@pytest.mark.parametrize("scheme", ["w8a8", "w4a16_asym"])
def test_it_computes_what_was_calibrated(tmp_path: Path, model_type: str, scheme: str) -> None:
    model, loaded, _ = deployed(tmp_path, model_type, scheme)
    input_ids, mask = random_batch(length=14, padding="left")
    with torch.no_grad():
        ours, theirs = (m(input_ids, attention_mask=mask).logits[mask.bool()] for m in (loaded, model))
    assert difference(ours, theirs) < (EXACT if scheme.startswith("w4a16") else CODES)
    first, second = theirs.topk(2).values.unbind(-1)
    clear = first - second > 2 * (ours - theirs).abs().max()  # random weights give near ties
    assert clear.float().mean() > 0.5 and torch.equal(ours.argmax(-1)[clear], theirs.argmax(-1)[clear])
    if scheme.startswith("w4a16"):
        assert torch.equal(greedy(loaded, input_ids[:1]), greedy(model, input_ids[:1]))


@pytest.mark.parametrize("scheme", ["w8a16", "w4a16_channel", "w4a8", "w4a8_asym"])
def test_every_scheme_runs(tmp_path: Path, scheme: str) -> None:
    model, loaded, _ = deployed(tmp_path, "llama", scheme)
    input_ids, _ = random_batch()
    with torch.no_grad():
        assert difference(loaded(input_ids).logits, model(input_ids).logits) < CODES


def count(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize(
    ("model_type", "scheme", "joined", "norms", "gates"),
    [
        ("llama", "w8a8", 4, 4, 2),  # two blocks: q, k, v and gate, up
        ("llama", "w4a16", 4, 0, 2),  # nothing to quantize in front of a product
        ("gemma2", "w8a8", 6, 6, 0),  # three blocks; its activation is no SiLU
        ("phi3", "w8a8", 0, 4, 0),  # joined by the architecture itself
        ("opt", "w8a8", 2, 0, 0),  # LayerNorm, and no gate
        ("mixtral", "w8a8", 10, 2, 0),  # four experts a block, whose norm feeds the router too
    ],
)
def test_products_are_joined_where_the_architecture_allows(
    tmp_path: Path, model_type: str, scheme: str, joined: int, norms: int, gates: int
) -> None:
    _, loaded, _ = deployed(tmp_path, model_type, scheme)
    assert [count(loaded, kind) for kind in (JoinedLinears, NormQuantizer, GatedMLP)] == [joined, norms, gates]


def test_joined_linears_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, loaded, _ = deployed(tmp_path, "llama", "w8a8")
    calls = []
    product = layers.packed_linear
    monkeypatch.setattr(layers, "packed_linear", lambda *args: calls.append(args) or product(*args))
    with torch.no_grad():
        loaded(torch.tensor([[5, 6, 7]]))
    assert len(calls) == 2 * 4  # q k v, o, gate up, down


def test_joined_linears_do_not_depend_on_the_order_of_calls(tmp_path: Path) -> None:
    model, loaded, _ = deployed(tmp_path, "llama", "w4a16")
    ours, theirs = (m.model.layers[0].self_attn for m in (loaded, model))
    x, other = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    for name, given in (("v_proj", x), ("k_proj", x), ("q_proj", other), ("k_proj", x), ("v_proj", other)):
        assert difference(getattr(ours, name)(given), getattr(theirs, name)(given)) < EXACT
    assert ours.q_proj.joined._last is None  # and the last call lets go of the result


def test_a_token_alone_is_rounded_as_in_company(tmp_path: Path) -> None:
    _, loaded, _ = deployed(tmp_path, "llama", "w8a8")
    mlp = loaded.model.layers[0].mlp
    assert isinstance(mlp, GatedMLP)
    x = torch.randn(4, 1, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.stack([mlp(token) for token in x]), mlp(x), rtol=1e-6, atol=1e-7)


def test_batches_padding_and_static_caches_change_no_answer(tmp_path: Path) -> None:
    _, loaded, _ = deployed(tmp_path, "qwen2", "w4a16")
    input_ids, mask = random_batch(length=10, padding="left")
    together = greedy(loaded, input_ids, attention_mask=mask)
    assert torch.equal(greedy(loaded, input_ids, attention_mask=mask, cache_implementation="static"), together)
    for row, (ids, kept) in enumerate(zip(input_ids, mask.bool(), strict=True)):
        assert torch.equal(greedy(loaded, ids[kept][None])[0], together[row])


def test_torch_compile_traces_it_in_one_graph(tmp_path: Path) -> None:
    _, loaded, _ = deployed(tmp_path, "llama", "w8a8")
    input_ids, _ = random_batch(batch=1)
    with torch.no_grad():
        compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
        assert difference(compiled(input_ids, use_cache=False).logits, loaded(input_ids).logits) < CODES


def test_no_weight_is_held_unpacked(tmp_path: Path) -> None:
    model, loaded, folder = deployed(tmp_path, "llama", "w8a8")
    held = sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()))
    stored = sum(tensor.nbytes for tensor in stored_tensors(folder).values())
    outer = sum(p.nbytes for name, p in loaded.named_parameters())
    # What is floating point takes four bytes on a CPU and two in the file; scales may too.
    scales = sum(tensor.numel() for name, tensor in loaded.named_buffers() if name.endswith("packed_scale"))
    assert held <= 1.05 * (stored + outer / 2 + 2 * scales)
    codes = sum(module.weight.nbytes() for module in loaded.modules() if isinstance(module, PackedLinear))
    assert codes < sum(p.numel() for p in model.parameters()) * 4


def test_loading_changes_no_file_and_saving_is_refused(tmp_path: Path) -> None:
    _, loaded, folder = deployed(tmp_path, "llama", "w8a8")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(CheckpointFormatError, match="copy the folder"):
        loaded.save_pretrained(tmp_path / "saved")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_packed_layer_stays_on_its_kind_of_device(tmp_path: Path) -> None:
    _, loaded, _ = deployed(tmp_path, "llama", "w4a16")
    layer = loaded.model.layers[0].self_attn.o_proj
    scale = layer.weight.scale
    assert loaded.to("cpu") is loaded and layer.weight.scale is layer._buffers["packed_scale"]
    assert loaded.half().model.layers[0].self_attn.o_proj.weight.scale.dtype == scale.dtype
    with pytest.raises(DeviceError, match="load the checkpoint there"):
        loaded.to("meta")


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        qrealign.load_packed(tmp_path / "absent")
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        _ = qrealign.load
    _, _, folder = deployed(tmp_path, "llama", "w4a16")
    layer = "model.layers.0.mlp.down_proj"
    narrower = {
        f"{layer}.weight_shape": torch.tensor([64, 64]),
        f"{layer}.weight_packed": torch.zeros(64, 8, dtype=torch.int32),
        f"{layer}.weight_scale": torch.ones(64, 2).bfloat16(),
    }
    rewrite(folder, lambda tensors: tensors.update(narrower))
    with pytest.raises(CheckpointFormatError, match="of different models"):
        qrealign.load_packed(folder, device="cpu")


def regroup(tensors: dict[str, torch.Tensor]) -> None:
    """Let the groups of every layer change places among the scales while the columns stay: the weights are the same."""
    for name in [name.removesuffix(".weight_scale") for name in tensors if name.endswith("weight_scale")]:
        scale, columns = tensors[f"{name}.weight_scale"], int(tensors[f"{name}.weight_shape"][1])
        order = torch.randperm(scale.shape[1])
        tensors[f"{name}.weight_scale"] = scale[:, order].contiguous()
        group = torch.arange(columns) // (columns // scale.shape[1])
        tensors[f"{name}.weight_g_idx"] = torch.argsort(order)[group].to(torch.int32)


def test_columns_may_lie_in_any_order(tmp_path: Path) -> None:
    """`actorder`: the groups of a row's columns are named one by one, and scales belong to them."""
    _, plain, folder = deployed(tmp_path, "llama", "w4a16")
    input_ids, _ = random_batch()
    rewrite(folder, regroup)
    loaded = qrealign.load_packed(folder, device="cpu")
    assert count(loaded, JoinedLinears) == 0
    dense = ModelPool(torch.device("cpu")).packed("it", open_packed(str(folder)))
    with torch.no_grad():
        before = plain(input_ids).logits
        assert difference(loaded(input_ids).logits, before) < EXACT
        assert difference(dense(input_ids).logits, before) < EXACT
    rewrite(folder, lambda tensors: tensors["model.layers.1.mlp.down_proj.weight_g_idx"].zero_())
    with pytest.raises(CheckpointFormatError, match="groups of unequal size"):
        qrealign.load_packed(folder, device="cpu")


def test_a_pool_that_multiplies_packed_weights_keeps_them_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, loaded, folder = deployed(tmp_path, "llama", "w8a8")
    pool, source = ModelPool(torch.device("cpu")), open_packed(str(folder))
    monkeypatch.setattr(ModelPool, "multiplies_packed", True)
    model = pool.packed("it", source)
    assert count(model, JoinedLinears) == count(loaded, JoinedLinears) and pool.packed("it", source) is model
    pool.release()
    monkeypatch.setattr(ModelPool, "_holds", lambda self, size: False)
    assert count(pool.packed("it", source), JoinedLinears) == 0  # streamed block by block


def test_biases_of_joined_linears(tmp_path: Path) -> None:
    source = open_tiny(tmp_path / "model", "qwen2")
    model = quantized(source, fitted("w4a16", source))
    attention = model.model.layers[0].self_attn
    linears = [
        blocks._Linear(layer.codes, layer.scale, None, layer.bias if kept else None, None, layer.scheme)
        for layer, kept in ((attention.q_proj, True), (attention.k_proj, False))
    ]
    joined = blocks._join_biases(linears, torch.float32)
    assert joined is not None
    assert torch.equal(joined[:64], attention.q_proj.bias) and not joined[64:].any()
