"""Writes the packed checkpoint, one block in memory at a time, so that it is either whole or absent."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from qrealign.config import QuantScheme
from qrealign.errors import CheckpointFormatError, ConfigError
from qrealign.files import (
    explain_full_disk,
    move_into_place,
    read_json,
    remove,
    sha256_of_text,
    write_json,
    write_tensors,
)
from qrealign.models.checkpoint import INDEX_NAME, WeightFiles, read_header
from qrealign.pack.blocks import as_stored, block_tensors, compare_block, rename
from qrealign.pack.format import quantization_config

if TYPE_CHECKING:
    from qrealign.models.source import ModelSource

_CONFIG = "config.json"
_METADATA = {"format": "pt"}
# Everything a server reads beside the weights; what the source lacks is passed over.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "preprocessor_config.json",
    "processor_config.json",
    "LICENSE",
    "LICENSE.txt",
    "NOTICE",
    "NOTICE.txt",
    "USE_POLICY.md",
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


class CheckpointWriter:
    """Writes one shard per block and one for the rest into a folder beside `directory`, which `finish` renames.

    Tensors keep the source checkpoint's names and dtype, except that a quantized linear's weight becomes its codes.
    Tied embeddings stay tied. After a crash, a writer with the same `identity`, source and scheme keeps the blocks
    that are whole.

    Args:
        source: the model whose blocks are packed.
        scheme: recipe of all quantized linears.
        directory: the checkpoint to be; an earlier checkpoint of this project is replaced at the end.
        identity: names the calibrated parameters (a hash of the run); None discards what an earlier writer left.

    Raises:
        ConfigError: `directory` holds something else.
    """

    def __init__(
        self, source: ModelSource, scheme: QuantScheme, directory: Path, *, identity: str | None = None
    ) -> None:
        self.source = source
        self.scheme = scheme
        self.directory = Path(directory)
        self.folder = self.directory.with_name(f".{self.directory.name}.writing")
        self._marker = self.directory.with_name(f".{self.directory.name}.writing.json")
        check_replaceable(self.directory)
        self._key = sha256_of_text(identity or "", source.fingerprint(), repr(scheme))
        if identity is not None and finished_key(self.directory) == self._key:
            # Killed between `finish` and whatever its caller notes down: the next `finish` puts it back.
            remove(self.folder)
            write_json(self._marker, self._key)  # first: a folder without its key would be discarded
            os.replace(self.directory, self.folder)
        elif identity is None or not self._marker.exists() or read_json(self._marker) != self._key:
            remove(self.folder)
            write_json(self._marker, self._key)
        self.folder.mkdir(parents=True, exist_ok=True)
        for left_over in self.folder.glob(".*.part"):  # half-written by a process that was killed
            remove(left_over)

    def has_block(self, index: int) -> bool:
        """Return whether block `index` is written whole."""
        return _is_whole(self._shard(index + 1))

    def has_outer(self) -> bool:
        """Return whether the tensors outside the blocks are written whole."""
        return _is_whole(self._shard(0))

    def add_block(self, index: int, block: nn.Module) -> None:
        """Write block `index`, read it back and compare every code.

        Its quantized linears are `QuantizedLinear`; other tensors are taken as they are.

        Raises:
            ValueError: a linear has another recipe than the checkpoint.
            CheckpointFormatError: what was read differs from what was written.
            QrealignError: the disk is full.
        """
        shard = self._shard(index + 1)
        write_tensors(shard, block_tensors(block, index, self.source, self.scheme), _METADATA)
        comparison = compare_block(WeightFiles([shard]), block, index, self.source, self.scheme)
        if comparison.differing_codes or comparison.problems:
            raise CheckpointFormatError(
                f"{shard} does not hold what was written ({comparison.differing_codes} codes differ; "
                f"{'; '.join(comparison.problems)}): check the disk"
            )

    def add_outer(self, state: Mapping[str, Tensor]) -> None:
        """Write the tensors outside the blocks (embeddings, final norm, head) by full name; tied ones are written once.

        Raises:
            ValueError: one is missing.
            QrealignError: the disk is full.
        """
        names = [name for name in self.source.shapes if not name.startswith(f"{self.source.spec.blocks}.")]
        if missing := [name for name in names if name not in state]:
            raise ValueError(f"the tensors outside the blocks lack {', '.join(missing)}")
        write_tensors(
            self._shard(0),
            {rename(name, self.source): as_stored(state[name], self.source.storage_dtype) for name in names},
            _METADATA,
        )

    def finish(self, provenance: Mapping[str, Any] | None = None) -> Path:
        """Write index, configuration and tokenizer, and rename the folder to `directory`, which is returned.

        Args:
            provenance: JSON values kept in `config.json` under `quantization_config.qrealign`; `run` is set here.

        Raises:
            ValueError: a block is missing.
            QrealignError: the disk is full.
        """
        shards = [self._shard(number) for number in range(self.source.num_blocks + 1)]
        missing = [shard.name for shard in shards if not _is_whole(shard)]
        if missing:
            raise ValueError(f"the checkpoint is not complete: {', '.join(missing)}")
        headers = {shard.name: read_header(shard) for shard in shards}
        weight_map = {name: shard for shard, tensors in headers.items() for name in tensors}
        total = sum(info.num_bytes for tensors in headers.values() for info in tensors.values())
        ignore = unquantized_linears(self.source, weight_map)
        write_json(
            self.folder / INDEX_NAME,
            {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
        )
        config = source_config(self.source)
        config["quantization_config"] = quantization_config(
            self.scheme, ignore, provenance={**(provenance or {}), "run": self._key}
        )
        write_json(self.folder / _CONFIG, config)
        with explain_full_disk(self.directory):
            self._copy_companions()
        move_into_place(self.folder, self.directory)
        remove(self._marker)
        return self.directory

    def _shard(self, number: int) -> Path:
        return self.folder / f"model-{number + 1:05d}-of-{self.source.num_blocks + 1:05d}.safetensors"

    def _copy_companions(self) -> None:
        for name in _COMPANIONS:
            origin, target = self.source.path / name, self.folder / name
            if origin.is_dir():
                shutil.copytree(origin, target, dirs_exist_ok=True)
            elif origin.is_file():
                shutil.copyfile(origin, target)
        if not any((self.folder / name).exists() for name in _TOKENIZER_FILES):
            self.source.tokenizer().save_pretrained(self.folder)


def unquantized_linears(source: ModelSource, stored: Mapping[str, Any]) -> list[str]:
    """Return the names of all linears that stay in floating point: the head, routers, and whatever was skipped.

    A renamed module is listed under both names, because readers differ in which one they match.
    """
    skeleton = source.skeleton()
    names = {name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    names.add("lm_head")
    # Routers are no `nn.Linear` in every library version, but servers hold them as linears.
    names.update(
        name.removesuffix(".weight")
        for name in skeleton.state_dict()
        if name.endswith(".weight") and source.spec.is_skipped(name.removesuffix(".weight"))
    )
    free = {name for name in names if f"{rename(name, source)}.weight_scale" not in stored}
    return sorted(free | {rename(name, source) for name in free})


def source_config(source: ModelSource) -> dict[str, Any]:
    """Return the source's `config.json` as a dictionary, with its storage dtype, and tied only if its files are."""
    config = dict(read_json(source.path / _CONFIG))
    config["tie_word_embeddings"] = bool(getattr(source.config, "tie_word_embeddings", False))
    config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(source.storage_dtype).removeprefix("torch.")
    return config


def _is_whole(shard: Path) -> bool:
    try:
        return shard.is_file() and bool(read_header(shard))
    except CheckpointFormatError:
        return False


def check_replaceable(directory: Path) -> None:
    """Refuse a folder that is neither absent, nor empty, nor an earlier checkpoint of this project.

    Raises:
        ConfigError: it is something else.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if finished_key(directory) is None:
        raise ConfigError(
            f"{directory} holds something else than a checkpoint of this project: choose another output folder"
        )


def finished_key(directory: Path) -> str | None:
    """Return the key of the run that wrote the checkpoint in `directory`, None where there is none of this project."""
    try:
        return str(read_json(directory / _CONFIG)["quantization_config"]["qrealign"]["run"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
