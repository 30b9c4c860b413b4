"""A model on disk: its shape without its weights, and its weights one block at a time, with an adapter merged."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from qrealign.arch import BlockSpec, block_spec
from qrealign.errors import CheckpointFormatError, ModelError
from qrealign.files import sha256_of_text
from qrealign.models.adapter import LoraAdapter
from qrealign.models.checkpoint import FLOAT_DTYPES, INTEGER_DTYPES, WeightFiles, find_weight_files
from qrealign.models.experts import split_experts
from qrealign.models.location import find_folder, load_config
from qrealign.models.placement import assign_tensor, assign_tensors, move_buffers
from qrealign.models.transfer import READERS, BlockLayout, read_blocks

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

Head = Literal["language", "classification"]

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


class WeightChange(Protocol):
    """What is done to tensors while they are read: a LoRA adapter, or a repair."""

    def merge(self, name: str, tensor: Tensor) -> Tensor:
        """Return the changed form of the tensor that the model calls `name`, on its device and in its dtype."""
        ...

    def fingerprint(self) -> str:
        """Return a SHA-256 over everything that decides the change."""
        ...


class ModelSource:
    """A decoder-only Hugging Face checkpoint, opened but not read; made by `open_model`.

    Attributes:
        path: the folder.
        head: what stands on the blocks, a language model's head or a sequence classifier's.
        name: its name, for messages and reports.
        config: the Hugging Face configuration.
        spec: the architecture's row.
        adapter: the LoRA adapter that every tensor is merged with, or None.
        changes: what every tensor passes through while it is read: the adapter, then repairs.
        storage_dtype: the floating-point dtype that most stored bytes have.
        num_blocks: number of decoder blocks.
        total_bytes: bytes of all stored tensors.
        stored_names: our full tensor name -> the name in the files (they differ where a checkpoint lacks the `model.`
            prefix, or names its experts otherwise). Tied tensors appear once, under the name that is stored.
        tied: tied tensor -> the tensor it shares its values with, e.g. `lm_head.weight` -> `model.embed_tokens.weight`.
    """

    def __init__(
        self, path: Path, config: Any, files: WeightFiles, adapter: LoraAdapter | None, head: Head = "language"
    ) -> None:
        self.path = path
        self.head: Head = head
        self.name = path.name if adapter is None else f"{path.name}+{adapter.folder.name}"
        self.config = config
        self.files = files
        self.adapter = adapter
        self.changes: tuple[WeightChange, ...] = () if adapter is None else (adapter,)
        self.total_bytes = files.total_bytes
        self.storage_dtype = _main_dtype(files)
        self._generation = _read_generation_config(path)
        model = _build_empty(config, self.storage_dtype, head)
        self.spec: BlockSpec = block_spec(config, model)
        self._split_experts(model)
        self.num_blocks = len(self.spec.blocks_of(model))
        self.tied = dict(getattr(model, "all_tied_weights_keys", {}))
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.stored_names = self._match_names(shapes, model)
        self.shapes = {name: shapes[name] for name in self.stored_names}
        self._linears = {
            f"{self.spec.blocks}.{name}": (module.out_features, module.in_features)
            for name, module in model.get_submodule(self.spec.blocks).named_modules()
            if isinstance(module, nn.Linear) and not self.spec.is_skipped(name)
        }
        if adapter is not None:
            adapter.bind(shapes, self.spec.renames, {*self.tied, *self.tied.values()})

    def skeleton(self, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Return the Hugging Face model with its parameters on the meta device and its non-persistent buffers real.

        It is in eval mode, needs no gradients, and holds experts as separate linears. `dtype` defaults to the stored
        one.
        """
        model = _build_empty(self.config, dtype or self.storage_dtype, self.head)
        self._split_experts(model)
        if self._generation is not None:
            model.generation_config = copy.deepcopy(self._generation)
        return model

    def block_state(self, index: int, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the CPU tensors of block `index`, named relative to the block, in `dtype` or as stored.

        An adapter is merged in float32 and the result rounded to the stored dtype, as if the merged model were on disk.
        """
        prefix = self.spec.block_name(index) + "."
        return self._read([name for name in self.stored_names if name.startswith(prefix)], prefix, dtype)

    def outer_state(self, *, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the CPU tensors outside the blocks by full name: embeddings, final norm, the head unless tied."""
        prefix = self.spec.blocks + "."
        return self._read([name for name in self.stored_names if not name.startswith(prefix)], "", dtype)

    def load_block(
        self, model: nn.Module, index: int, device: torch.device | str, dtype: torch.dtype | None = None
    ) -> nn.Module:
        """Put the weights of block `index` into `model` and return it; other parameters of swapped linears stay."""
        block = model.get_submodule(self.spec.block_name(index))
        assign_tensors(block, self.block_state(index), device, dtype)
        move_buffers(block, device)
        return block

    def block_layout(self, index: int, dtype: torch.dtype) -> BlockLayout:
        """Return how the tensors of block `index` lie in one buffer, floating-point ones as `dtype`."""
        infos = {name: self.files.tensors[stored] for name, stored in self._block_names(index).items()}
        return BlockLayout.of(
            {
                name: (info.shape, dtype if info.dtype in FLOAT_DTYPES else INTEGER_DTYPES[info.dtype])
                for name, info in infos.items()
            }
        )

    def unmerged_block(self, index: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the CPU tensors of block `index` as they lie in the files, for `merge_block` to change where they go.

        They are mapped, neither checked nor cast. Where a cast to `dtype` stands between the files and the device, the
        changes come first, and what is returned is merged already.
        """
        if self._merges_in(index, dtype):
            names = self._block_names(index)
            stored = self.files.read(names.values(), check=False)
            return {name: stored[file_name] for name, file_name in names.items()}
        return self.block_state(index)

    @torch.no_grad()
    def merge_block(self, index: int, tensors: Mapping[str, Tensor]) -> bool:
        """Apply the changes to what `unmerged_block` returned, in place and on any device; return whether any did."""
        dtype = next(iter(tensors.values())).dtype
        if not self.changes or not self._merges_in(index, dtype):
            return False
        changed = False
        for name, tensor in tensors.items():
            merged = self.merged(f"{self.spec.block_name(index)}.{name}", tensor)
            if merged is not tensor:
                tensor.copy_(merged)
                changed = True
        return changed

    def becomes(self, other: ModelSource, dtype: torch.dtype) -> bool:
        """Return whether this model, held as `dtype`, is that of `other` once `merged` was applied to its blocks."""
        same = self.path == other.path and self.head == other.head and not self.changes
        return same and all(self._merges_in(index, dtype) for index in range(self.num_blocks))

    @torch.no_grad()
    def merged(self, name: str, tensor: Tensor) -> Tensor:
        """Return the changed form of a tensor by its full name, or the tensor itself where nothing changes it."""
        for change in self.changes:
            tensor = change.merge(name, tensor)
        return tensor

    def _block_names(self, index: int) -> dict[str, str]:
        """Return the tensors of a block: name relative to the block -> name in the files."""
        prefix = self.spec.block_name(index) + "."
        return {
            name.removeprefix(prefix): stored for name, stored in self.stored_names.items() if name.startswith(prefix)
        }

    def _merges_in(self, index: int, dtype: torch.dtype) -> bool:
        """Whether a block's tensors are stored as `dtype`, so that they may be changed after they were moved."""
        stored = (self.files.tensors[name].dtype for name in self._block_names(index).values())
        return all(FLOAT_DTYPES.get(name, dtype) == dtype for name in stored)

    def load_outer(self, model: PreTrainedModel, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Put the tensors outside the blocks into `model`, tie what is tied, and move its buffers to `device`."""
        assign_tensors(model, self.outer_state(), device, dtype)
        for target, source in self.tied.items():
            have, lack = (source, target) if source in self.stored_names else (target, source)
            parent, _, leaf = lack.rpartition(".")
            model.get_submodule(parent)._parameters[leaf] = model.get_parameter(have)
        move_buffers(model, device)

    def load_model(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Return the whole model on `device`, adapter merged, one block on its way at a time."""
        model = self.skeleton(dtype=dtype)
        self.load_outer(model, device, dtype)
        for _ in self.load_blocks(model, torch.device(device), dtype):
            pass
        return model

    def load_blocks(
        self,
        model: nn.Module,
        device: torch.device,
        dtype: torch.dtype | None = None,
        *,
        start: int = 0,
        ahead: int = READERS,
    ) -> Iterator[nn.Module]:
        """Load every block from `start` on as `load_block` does and yield it; on the way to a GPU `ahead` are read
        before their turn.
        """
        if device.type != "cuda":
            for index in range(start, self.num_blocks):
                yield self.load_block(model, index, device, dtype)
            return
        for index, tensors in read_blocks(self, device, dtype or self.storage_dtype, start=start, ahead=ahead):
            block = model.get_submodule(self.spec.block_name(index))
            names = self._block_names(index)
            self.files.check_finite({names[name]: tensor for name, tensor in tensors.items()})
            for name, tensor in tensors.items():
                assign_tensor(block, name, tensor)
            move_buffers(block, device)
            yield block

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Return every linear of the blocks that may be quantized: full name -> (out_features, in_features)."""
        return dict(self._linears)

    def changed_by(self, change: WeightChange) -> ModelSource:
        """Return this model with `change` applied to every tensor that is read, as if the result were on disk."""
        changed = copy.copy(self)
        changed.changes = (*self.changes, change)
        changed.__dict__.pop("_fingerprint", None)
        return changed

    def read_tensor(self, name: str) -> Tensor:
        """Return one CPU tensor by its full name, in its stored dtype; a tied one is read under either name."""
        if name not in self.stored_names:
            name = self.tied.get(name) or next(target for target, source in self.tied.items() if source == name)
        return self._read([name], "", None)[name]

    @functools.cached_property
    def _fingerprint(self) -> str:
        config = (self.path / "config.json").read_text(encoding="utf-8")
        changes = [change.fingerprint() for change in self.changes] or [""]
        return sha256_of_text(config, self.files.fingerprint(), *changes)

    def fingerprint(self) -> str:
        """Return a SHA-256 over configuration, changes, and sizes, headers and samples of every weight tensor."""
        return self._fingerprint

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return the folder's tokenizer.

        Raises:
            ModelError: the folder has none, or it cannot be read.
        """
        from transformers import AutoTokenizer

        if not any((self.path / name).is_file() for name in _TOKENIZER_FILES):
            raise ModelError(
                f"{self.path} has no tokenizer: copy tokenizer.json and tokenizer_config.json of the original "
                "model into it"
            )
        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        except Exception as error:  # transformers and tokenizers raise many kinds here, a bare Exception among them
            raise ModelError(
                f"the tokenizer in {self.path} cannot be read ({_first_line(error)}): copy the original model's again"
            ) from error

    def _split_experts(self, model: PreTrainedModel) -> None:
        """Turn the fused experts of every block into linears."""
        for block in self.spec.blocks_of(model):
            split_experts(block, self.spec)
        model.requires_grad_(False)

    def _read(self, names: list[str], prefix: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Read tensors by our names, apply the changes, cut `prefix` from the names and cast what is floating point."""
        stored = self.files.read(self.stored_names[name] for name in names)
        state = {}
        for name in names:
            tensor = self.merged(name, stored.pop(self.stored_names[name]))
            if dtype is not None and tensor.is_floating_point():
                tensor = tensor.to(dtype)
            state[name.removeprefix(prefix)] = tensor
        return state

    def _match_names(self, shapes: dict[str, tuple[int, ...]], model: PreTrainedModel) -> dict[str, str]:
        """Find every tensor of the model in the files and check its shape."""
        candidates = {name: self._stored_name(name, model.base_model_prefix) for name in shapes}
        stored = {name: found for name, found in candidates.items() if found is not None}
        if not self.spec.known and len(stored) < len(shapes):
            renamed = _rename_as_transformers(self.files.tensors, model)
            stored.update({name: renamed[name] for name in shapes if name not in stored and name in renamed})
        self._settle_tied(stored)
        missing = [name for name in shapes if name not in stored and name not in self._tied_names(stored)]
        if missing:
            raise CheckpointFormatError(
                f"{self.path} lacks {len(missing)} tensor(s) that its config.json calls for ({missing[0]} ...): "
                "copy the folder again, or save the model with save_pretrained"
            )
        for name, found in stored.items():
            tensor = self.files.tensors[found]
            if tensor.shape != shapes[name]:
                raise CheckpointFormatError(
                    f"{tensor.file}: tensor {found} has shape {tensor.shape}, but config.json calls for "
                    f"{shapes[name]}: weights and config.json are of different models"
                )
        return stored

    def _stored_name(self, name: str, base_prefix: str) -> str | None:
        """Return the name under which the files hold the tensor that we call `name`."""
        renamed = name
        for ours, theirs in self.spec.renames:
            renamed = renamed.replace(ours, theirs)
        for candidate in (name, renamed, renamed.removeprefix(f"{base_prefix}.")):
            if candidate in self.files.tensors:
                return candidate
        return None

    def _settle_tied(self, stored: dict[str, str]) -> None:
        """Keep one name of each tied pair; a pair stored with different values is no tie, whatever config.json says."""
        for target, source in list(self.tied.items()):
            if target not in stored or source not in stored:
                continue
            both = self.files.read({stored[target], stored[source]})
            if torch.equal(both[stored[target]], both[stored[source]]):
                del stored[target]
            else:
                self.config.tie_word_embeddings = False
                del self.tied[target]

    def _tied_names(self, stored: dict[str, str]) -> set[str]:
        """Return the names that get their values from a tied tensor that is stored."""
        names = {target for target, source in self.tied.items() if source in stored}
        return names | {source for target, source in self.tied.items() if target in stored}


def open_model(path_or_id: str, *, adapter: str | None = None, head: Head = "language") -> ModelSource:
    """Open a model folder or Hub id, with a LoRA adapter (folder or Hub id) to merge; no weights are read.

    The Hub's offline variables are honoured; from the Hub only safetensors, JSON, template and tokenizer files are
    fetched. `head` is what stands on the blocks: the language model's, or the labels' of a sequence classifier.

    Raises:
        UnsupportedArchitectureError: no decoder-only text model, or one that transformers does not know.
        CheckpointFormatError: weights are missing, damaged, or a pickle.
        ModelError: the path is missing or no model, the model is quantized already, or the adapter belongs to another
            one.
    """
    path = find_folder(path_or_id, "model")
    config = load_config(path)
    files = WeightFiles(find_weight_files(path))
    lora = None if adapter is None else LoraAdapter(find_folder(adapter, "adapter"))
    return ModelSource(path, config, files, lora, head)


def check_same_shape(model: ModelSource, other: ModelSource) -> None:
    """Refuse two models that do not have the same tensors.

    Raises:
        ModelError: they differ in architecture, in tensors or in shapes.
    """
    advice = "give the aligned model that this one was fine-tuned from"
    if model.config.model_type != other.config.model_type:
        raise ModelError(
            f"{other.path} is of type {other.config.model_type} and {model.path} of type "
            f"{model.config.model_type}: {advice}"
        )
    for field in ("num_hidden_layers", "hidden_size", "vocab_size"):
        mine, theirs = getattr(model.config, field, None), getattr(other.config, field, None)
        if mine != theirs:
            raise ModelError(f"{other.path} has {field} {theirs} and {model.path} has {mine}: {advice}")
    for name in sorted({*model.shapes, *other.shapes} - {*model.tied, *other.tied}):
        mine, theirs = model.shapes.get(name), other.shapes.get(name)
        if mine != theirs:
            raise ModelError(
                f"tensor {name} has shape {theirs or 'none'} in {other.path} and {mine or 'none'} in "
                f"{model.path}: {advice}"
            )


def _build_empty(config: Any, dtype: torch.dtype, head: Head) -> PreTrainedModel:
    """Return the Hugging Face model of a configuration, parameters on the meta device, in eval mode.

    Raises:
        ModelError: transformers cannot build it, as with an activation that it does not know.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForCausalLM if head == "language" else AutoModelForSequenceClassification
    # from_config writes its dtype into the configuration it is given.
    try:
        with init_empty_weights(include_buffers=False):
            return kind.from_config(copy.deepcopy(config), dtype=dtype).eval()
    except Exception as error:  # each architecture fails in its own way on values that it cannot take
        raise ModelError(
            f"{config.name_or_path}/config.json has a value from which transformers builds no model "
            f"({type(error).__name__}: {_first_line(error)}): copy the original model's config.json again"
        ) from error


def _read_generation_config(folder: Path) -> GenerationConfig | None:
    """Return the generation settings of a model folder, None where it has none."""
    from transformers import GenerationConfig

    file = folder / "generation_config.json"
    if not file.is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds on values of the wrong type
        raise ModelError(
            f"{file} cannot be read ({type(error).__name__}: {_first_line(error)}): copy it again, or delete it"
        ) from error


def _rename_as_transformers(stored: Iterable[str], model: PreTrainedModel) -> dict[str, str]:
    """Return tensor names as transformers renames them on loading -> stored names, for types outside our table."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    renamings = [step for step in get_model_conversion_mapping(model) if isinstance(step, WeightRenaming)]
    names = {}
    for original in stored:
        name = original
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        names[name] = original
    return names


def _main_dtype(files: WeightFiles) -> torch.dtype:
    """Return the floating-point dtype that most bytes of a checkpoint have, the codes of packed layers aside."""
    sizes: Counter[str] = Counter()
    for name, tensor in files.tensors.items():
        packed = f"{name.rpartition('.')[0]}.weight_scale" in files.tensors
        if tensor.dtype in FLOAT_DTYPES or not packed:
            sizes[tensor.dtype] += tensor.num_bytes
    most = max(sizes, key=lambda name: sizes[name], default="none")
    if most not in FLOAT_DTYPES or most == "F64":  # no kernel computes in float64
        raise ModelError(
            f"{files.files[0].parent} stores its weights as {most}: give the model in bfloat16, float16 or float32"
        )
    return FLOAT_DTYPES[most]


def _first_line(error: Exception) -> str:
    """Return the first line of an error's text, for a message of one sentence."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
