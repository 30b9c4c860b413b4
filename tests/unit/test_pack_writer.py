"""The packed checkpoint: what is written is what was calibrated, what is read back, and what transformers loads."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from qrealign.config import parse_scheme
from qrealign.errors import CheckpointFormatError, ConfigError, QrealignError
from qrealign.models.source import open_model
from qrealign.pack import writer as writer_module
from qrealign.pack.verify import verify_checkpoint
from qrealign.pack.writer import CheckpointWriter
from qrealign.quant.packed import QuantizedLinear
from tests.helpers import DENSE_TYPES, tiny_adapter
from tests.unit.pack_helpers import blocks_of, fitted, open_tiny, quantized, write

LOADABLE = ("w8a8", "w8a16", "w4a16", "w4a16_channel", "w4a8", "w4a4")
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2")
IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0))


def loads_exactly(directory: Path, model: nn.Module) -> bool:
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        return torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory):  # type: ignore[no-untyped-def]
    """Tiny sources by model type, made once."""
    made = {}

    def get(model_type: str):  # type: ignore[no-untyped-def]
        if model_type not in made:
            made[model_type] = open_tiny(tmp_path_factory.mktemp(model_type) / "model", model_type)
        return made[model_type]

    return get


@pytest.mark.parametrize("scheme_name", LOADABLE)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_transformers_loads_the_calibrated_model_exactly(
    sources, tmp_path: Path, model_type: str, scheme_name: str
) -> None:  # type: ignore[no-untyped-def]
    source = sources(model_type)
    scheme = fitted(scheme_name, source)
    model = quantized(source, scheme)
    directory = write(source, scheme, model, tmp_path / "out")
    result = verify_checkpoint(directory, source, blocks_of(source, model))
    assert result.passed and result.differing_codes == 0 and result.blocks == source.num_blocks, result.problems
    assert result.compared_codes == sum(rows * columns for rows, columns in source.linear_shapes().values())
    assert loads_exactly(directory, model)


@pytest.mark.parametrize("model_type", [name for name in DENSE_TYPES if name not in FAMILIES])
def test_other_architectures_load_exactly_too(sources, tmp_path: Path, model_type: str) -> None:  # type: ignore[no-untyped-def]
    source = sources(model_type)
    scheme = fitted("w4a16", source)
    model = quantized(source, scheme)
    assert loads_exactly(write(source, scheme, model, tmp_path / "out"), model)


def test_zero_points_load_as_plain_weights_in_the_stored_dtype(sources, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = sources("llama")
    scheme = fitted("w4a16_asym", source)
    model = quantized(source, scheme)
    directory = write(source, scheme, model, tmp_path / "out")
    assert verify_checkpoint(directory, source, blocks_of(source, model)).passed
    options = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLinear):
            assert torch.equal(loaded.get_parameter(f"{name}.weight"), layer.dequantize(torch.bfloat16).float())


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe"])
def test_experts_are_packed_one_by_one_and_routers_are_ignored(sources, tmp_path: Path, model_type: str) -> None:  # type: ignore[no-untyped-def]
    source = sources(model_type)
    scheme = fitted("w8a8", source)
    model = quantized(source, scheme)
    directory = write(source, scheme, model, tmp_path / "out")
    assert verify_checkpoint(directory, source, blocks_of(source, model)).passed
    names = set(json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"])
    ignore = json.loads((directory / "config.json").read_text())["quantization_config"]["ignore"]
    if model_type == "mixtral":
        assert "model.layers.1.block_sparse_moe.experts.3.w2.weight_scale" in names
        assert {"lm_head", "model.layers.0.block_sparse_moe.gate", "model.layers.0.mlp.gate"} <= set(ignore)
    else:
        assert "model.layers.1.mlp.experts.3.down_proj.weight_scale" in names
        assert ignore == ["lm_head", "model.layers.1.mlp.gate", "model.layers.1.mlp.shared_expert_gate"]


def test_the_folder_holds_all_that_a_server_reads(tmp_path: Path) -> None:
    source = open_tiny(tmp_path / "model", tie_word_embeddings=True)
    scheme = fitted("w8a8", source)
    directory = write(source, scheme, quantized(source, scheme), tmp_path / "out")
    config = json.loads((directory / "config.json").read_text())
    assert (
        config["dtype"] == "bfloat16"
        and config["tie_word_embeddings"] is True
        and config["architectures"] == ["LlamaForCausalLM"]
    )
    assert (
        config["quantization_config"]["ignore"] == ["lm_head"]
        and config["quantization_config"]["qrealign"]["method"] == "rtn"
    )
    assert AutoTokenizer.from_pretrained(directory).chat_template == source.tokenizer().chat_template
    assert (directory / "generation_config.json").is_file()
    shards = sorted(directory.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for shard in shards for t in load_file(shard).values())
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    stored = load_file(shards[0])
    assert set(stored) == {"model.embed_tokens.weight", "model.norm.weight"}  # the tied head is not written
    assert all(tensor.dtype == torch.bfloat16 for tensor in stored.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]  # nothing is left aside


def test_an_adapter_and_changed_norms_end_in_the_file(tmp_path: Path) -> None:
    base = open_tiny(tmp_path / "model").path
    source = open_model(str(base), adapter=str(tiny_adapter(tmp_path / "adapter", base)))
    scheme = fitted("w8a8", source)
    model = quantized(source, scheme)
    norm = model.get_submodule("model.layers.0.input_layernorm")
    norm.weight.data = (norm.weight * 2).to(torch.bfloat16).float()  # as a fold does
    directory = write(source, scheme, model, tmp_path / "out")
    assert verify_checkpoint(directory, source, blocks_of(source, model)).passed
    assert loads_exactly(directory, model)


def test_a_source_without_companions_gets_its_tokenizer_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_tiny(tmp_path / "model")
    scheme = fitted("w8a8", source)
    model, tokenizer = quantized(source, scheme), source.tokenizer()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (source.path / name).unlink(missing_ok=True)
    templates = source.path / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("x", encoding="utf-8")
    monkeypatch.setattr(source, "tokenizer", lambda: tokenizer)
    directory = write(source, scheme, model, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(directory).chat_template is not None
    assert (directory / "additional_chat_templates" / "tool_use.jinja").is_file()


def test_a_writer_killed_while_it_takes_a_finished_checkpoint_back_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_tiny(tmp_path / "model")
    scheme = fitted("w8a8", source)
    rename = os.replace

    def begin() -> CheckpointWriter:
        return CheckpointWriter(source, scheme, tmp_path / "out", identity="run")

    writer = begin()
    for index, block in blocks_of(source, quantized(source, scheme)):
        writer.add_block(index, block)
    writer.add_outer(source.outer_state())
    directory = writer.finish()

    def killed_behind_it(origin: Path, target: Path) -> None:
        rename(origin, target)
        if origin == directory:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed_behind_it)
    with pytest.raises(KeyboardInterrupt):
        begin()
    monkeypatch.undo()
    assert begin().finish() == directory


def test_a_killed_writer_goes_on_with_the_blocks_that_are_whole(tmp_path: Path) -> None:
    source = open_tiny(tmp_path / "model")
    scheme = fitted("w8a8", source)
    model = quantized(source, scheme)
    blocks = dict(blocks_of(source, model))

    def begin(identity: str | None) -> CheckpointWriter:
        return CheckpointWriter(source, scheme, tmp_path / "out", identity=identity)

    first = begin("run 1")
    first.add_block(0, blocks[0])
    first.add_outer(source.outer_state())
    (first.folder / ".model-00003-of-00003.safetensors.7.part").write_bytes(b"half")
    again = begin("run 1")
    assert (again.has_block(0), again.has_block(1), again.has_outer()) == (True, False, True)
    with pytest.raises(ValueError, match=r"not complete: model-00003-of-00003\.safetensors"):
        again.finish()
    shard = again.folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-7])
    assert not again.has_block(0)
    for index, block in blocks.items():
        again.add_block(index, block)
    directory = again.finish()
    assert verify_checkpoint(directory, source, blocks.items()).passed
    assert not list(directory.glob(".*"))

    # Killed after the rename, before the caller noted it down: nothing has to be written again.
    assert begin("run 1").has_block(1) and not directory.exists()
    assert begin("run 1").finish() == directory and verify_checkpoint(directory, source, blocks.items()).passed

    begin("run 2").add_block(0, blocks[0])
    assert begin("run 2").has_block(0)
    assert not begin("run 3").has_block(0)  # other parameters: nothing of the earlier run is kept
    begin("run 3").add_block(0, blocks[0])
    assert not begin(None).has_block(0)
    assert verify_checkpoint(directory, source, blocks.items()).passed  # the finished one stands until it is replaced


def test_only_an_earlier_checkpoint_of_ours_is_replaced(tmp_path: Path) -> None:
    source = open_tiny(tmp_path / "model")
    scheme = fitted("w8a8", source)
    model = quantized(source, scheme)
    (tmp_path / "out").mkdir()
    directory = write(source, scheme, model, tmp_path / "out")
    (directory / "extra.txt").write_text("x", encoding="utf-8")
    assert not (write(source, scheme, model, directory) / "extra.txt").exists()
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for target in (source.path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="holds something else"):
            CheckpointWriter(source, scheme, target)


def test_a_block_that_reads_back_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_tiny(tmp_path / "model")
    scheme = fitted("w8a8", source)
    model = quantized(source, scheme)
    write_tensors = writer_module.write_tensors

    def corrupt(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        write_tensors(path, {**tensors, name: tensors[name] ^ 1}, metadata)

    monkeypatch.setattr(writer_module, "write_tensors", corrupt)
    with pytest.raises(CheckpointFormatError, match=r"6144 codes differ; block 0 differs .*check the disk"):
        CheckpointWriter(source, scheme, tmp_path / "out").add_block(0, model.get_submodule("model.layers.0"))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "no space"), SafetensorError("I/O error: No space left on device (os error 28)")]
)
def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    source = open_tiny(tmp_path / "model")
    scheme = fitted("w8a8", source)
    writer = CheckpointWriter(source, scheme, tmp_path / "out", identity="a")
    model = quantized(source, scheme)
    block = model.get_submodule("model.layers.0")

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(QrealignError, match=r"disk is full while writing .*run the same command again"):
        writer.add_block(0, block)
    error = OSError(errno.EACCES, "denied")
    with pytest.raises(OSError, match="denied"):
        writer.add_block(0, block)


def test_what_does_not_belong_together_is_our_own_bug(sources, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    source = sources("llama")
    model = quantized(source, fitted("w4a16", source))
    writer = CheckpointWriter(source, parse_scheme("w8a8"), tmp_path / "out")
    with pytest.raises(ValueError, match="servers need one recipe"):
        writer.add_block(0, model.get_submodule("model.layers.0"))
    with pytest.raises(ValueError, match=r"lack model\.embed_tokens\.weight"):
        writer.add_outer({})


class TestVerification:
    """Every kind of damage is found."""

    @pytest.fixture
    def written(self, tmp_path: Path):  # type: ignore[no-untyped-def]
        source = open_tiny(tmp_path / "model", "qwen2")
        scheme = fitted("w4a16_asym", source)
        model = quantized(source, scheme)
        return source, model, write(source, scheme, model, tmp_path / "out")

    def edit(self, directory: Path, shard: int, change) -> None:  # type: ignore[no-untyped-def]
        path = directory / f"model-0000{shard}-of-00003.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file(tensors, path, {"format": "pt"})

    def problems(self, written) -> str:  # type: ignore[no-untyped-def]
        source, model, directory = written
        return " | ".join(verify_checkpoint(directory, source, blocks_of(source, model)).problems)

    def test_a_changed_code(self, written) -> None:  # type: ignore[no-untyped-def]
        source, model, directory = written
        layer = model.get_submodule("model.layers.0.mlp.up_proj")
        assert isinstance(layer, QuantizedLinear) and layer.zero_point is not None
        layer.codes[3, 5] = -layer.codes[3, 5] - 1
        layer.zero_point[0, 0] = -layer.zero_point[0, 0] - 1
        result = verify_checkpoint(directory, source, blocks_of(source, model))
        assert result.differing_codes == 2 and not result.passed
        assert "block 0 differs from the file in model.layers.0.mlp.up_proj.weight_packed" in " | ".join(
            result.problems
        )

    def test_a_changed_norm(self, written) -> None:  # type: ignore[no-untyped-def]
        written[1].get_submodule("model.layers.1.input_layernorm").weight.data.add_(1)
        assert "block 1 differs from the file in model.layers.1.input_layernorm.weight" in self.problems(written)

    def test_a_missing_and_an_unknown_tensor(self, written) -> None:  # type: ignore[no-untyped-def]
        self.edit(
            written[2], 2, lambda tensors: tensors.update(stray=tensors.pop("model.layers.0.mlp.up_proj.weight_scale"))
        )
        found = self.problems(written)
        assert "1 tensors are missing: model.layers.0.mlp.up_proj.weight_scale" in found
        assert "1 tensors are not of this model: stray" in found
        assert "index and the files disagree" in found and "block 0 is not whole" in found

    def test_a_tensor_in_two_files(self, written) -> None:  # type: ignore[no-untyped-def]
        self.edit(
            written[2], 2, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)})
        )
        assert "more than one file holds model.norm.weight" in self.problems(written)

    def test_wrong_shapes(self, written) -> None:  # type: ignore[no-untyped-def]
        def change(tensors: dict[str, torch.Tensor]) -> None:
            tensors["model.layers.0.input_layernorm.weight"] = torch.ones(3, dtype=torch.bfloat16)
            tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.ones(96, 1, dtype=torch.bfloat16)

        self.edit(written[2], 2, change)
        source, _, directory = written
        found = " | ".join(verify_checkpoint(directory, source).problems)
        assert "input_layernorm.weight has shape (3,), the source has (64,)" in found
        assert "mlp.up_proj takes" in found

    def test_layers_that_servers_fuse_must_share_their_fate(self, written) -> None:  # type: ignore[no-untyped-def]
        path = written[2] / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"]["ignore"].append("model.layers.0.self_attn.q_proj")
        path.write_text(json.dumps(config))
        assert "servers fuse model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj" in self.problems(written)

    def test_other_folders(self, written, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        source, _, directory = written
        with pytest.raises(CheckpointFormatError, match="not quantized"):
            verify_checkpoint(source.path, source)
        shutil.copytree(directory, tmp_path / "cut")
        shard = tmp_path / "cut" / "model-00002-of-00003.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1])
        with pytest.raises(CheckpointFormatError, match="truncated"):
            verify_checkpoint(tmp_path / "cut", source)
        (directory / "model.safetensors.index.json").unlink()  # shards alone are enough
        assert verify_checkpoint(directory, source).passed
