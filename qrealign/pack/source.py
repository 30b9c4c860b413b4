"""A packed checkpoint opened on its own, without the model that it was made from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qrealign.config import QuantScheme
from qrealign.errors import CheckpointFormatError
from qrealign.models.checkpoint import WeightFiles, find_weight_files
from qrealign.models.location import find_folder, load_config, read_config
from qrealign.models.source import ModelSource
from qrealign.pack.blocks import rename, some_of
from qrealign.pack.format import QUANTIZED_SUFFIXES, missing_suffixes
from qrealign.pack.schemes import LayerSchemes, parse_schemes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPRESSED_TENSORS = "compressed-tensors"


class PackedSource(ModelSource):
    """A compressed-tensors checkpoint of integer schemes, ours or anybody's; made by `open_packed`.

    Its blocks are filled by `pack.load.fill_block` or by `deploy`; everything else is as in `ModelSource`, but for
    `total_bytes`, which is what the weights take once they are unpacked. Linears that the file holds in floating point
    are no quantized linears, and `linear_shapes` leaves them out.

    Attributes:
        schemes: full name of a quantized linear -> its recipe.
        packed_bytes: bytes of the tensors as they are stored.
    """

    def __init__(self, path: Path, config: Any, files: WeightFiles, recipes: LayerSchemes) -> None:
        self._recipes = recipes
        self.schemes: dict[str, QuantScheme] = {}
        self.packed_bytes = files.total_bytes
        super().__init__(path, config, files, None)
        self._linears = {name: shape for name, shape in self._linears.items() if name in self.schemes}
        if not self._linears or (others := self.schemes.keys() - self._linears.keys()):
            what = f"quantizes {some_of(sorted(others))}, no linear" if self._linears else "holds no quantized layer"
            raise CheckpointFormatError(f"{path} {what}, which is not supported: give another checkpoint")
        self.total_bytes = self.storage_dtype.itemsize * sum(math.prod(shape) for shape in self.shapes.values())

    def _match_names(self, shapes: dict[str, tuple[int, ...]], model: PreTrainedModel) -> dict[str, str]:
        """Find every tensor; a quantized linear's weight is there as the set of tensors of its scheme."""
        packed = {}
        for name in shapes:
            module = name.removesuffix(".weight")
            stored = rename(module, self)
            if name.endswith(".weight") and f"{stored}.weight_scale" in self.files.tensors:
                self.schemes[module] = self._scheme_of(module, stored)
                packed[name] = f"{stored}.weight"
        rest = super()._match_names({name: shape for name, shape in shapes.items() if name not in packed}, model)
        return {name: packed.get(name) or rest[name] for name in shapes if name in packed or name in rest}

    def _scheme_of(self, linear: str, stored: str) -> QuantScheme:
        """Return the recipe of a linear whose scale is in the file, which must hold the rest of it too."""
        if not linear.startswith(f"{self.spec.blocks}."):
            raise CheckpointFormatError(
                f"{self.path} quantizes {stored}, and only linears of the decoder blocks are run quantized: give a "
                "checkpoint that leaves embedding and head alone"
            )
        scheme = self._recipes.scheme_for((linear, stored))
        if scheme is None:
            raise CheckpointFormatError(
                f"{self.path}: layer {stored} is stored quantized, but config.json leaves it out: copy the folder again"
            )
        found = {suffix for suffix in QUANTIZED_SUFFIXES if f"{stored}.{suffix}" in self.files.tensors}
        if missing := missing_suffixes(found, scheme):
            raise CheckpointFormatError(
                f"{self.path}: layer {stored} lacks {', '.join(missing)} for scheme {scheme.name}: copy it again"
            )
        return scheme


def is_packed(folder: Path) -> bool:
    """Return whether the folder's config.json names compressed-tensors.

    Raises:
        ModelError: there is no readable config.json.
    """
    settings = read_config(folder).get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == COMPRESSED_TENSORS


def open_packed(path_or_id: str) -> PackedSource:
    """Open a compressed-tensors checkpoint, a folder or a Hub id; no weights are read.

    Raises:
        ModelError: the path is missing or no model.
        CheckpointFormatError: weights are missing or damaged, or a layer has a scheme that is not run here.
    """
    path = find_folder(path_or_id, "model")
    block = read_config(path).get("quantization_config")
    if not isinstance(block, dict) or block.get("quant_method") != COMPRESSED_TENSORS:
        raise CheckpointFormatError(
            f"{path} is no compressed-tensors checkpoint: give the folder that qrealign or llm-compressor packed"
        )
    try:
        recipes = parse_schemes(block)
    except CheckpointFormatError as error:
        raise CheckpointFormatError(f"{path} cannot be run: {error}") from error
    return PackedSource(path, load_config(path, packed=True), WeightFiles(find_weight_files(path)), recipes)
