"""The model that is served: its weights, its tokenizer, its name, and what its report says of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qrealign.data.encode import ChatEncoder
from qrealign.data.generate import find_stop_ids
from qrealign.deploy.load import deploy_model
from qrealign.errors import ConfigError, ModelError
from qrealign.files import read_json
from qrealign.models.device import compute_dtype
from qrealign.models.location import find_folder
from qrealign.models.source import open_model
from qrealign.pack.source import PackedSource, is_packed, open_packed
from qrealign.serve.replies import Verdict
from qrealign.serve.runner import FEWEST_TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LONGEST = 4096  # tokens of a slot where nothing is said: models that take 131072 would leave no room for others


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model on its device and what requests need of it.

    Attributes:
        name: in requests.
        model: in eval mode.
        encoder: prompts and conversations into ids; `max_length` is that of a slot.
        stop_ids: tokens that end an answer.
        scheme: of the quantization, or the dtype of a plain model.
        verdict: of the report beside the folder, None where there is none.
    """

    name: str
    model: PreTrainedModel
    encoder: ChatEncoder
    stop_ids: frozenset[int]
    scheme: str
    verdict: Verdict | None
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def vocabulary(self) -> int:
        """Ids that the model knows."""
        return int(self.model.config.get_text_config().vocab_size)

    def decode(self, ids: Any) -> str:
        """Return the text of ids as the tokenizer joins it, without special tokens."""
        return str(
            self.encoder.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


def load_served(
    path_or_id: str,
    *,
    device: torch.device,
    dtype: str | None,
    max_length: int | None,
    name: str | None = None,
    head_bits: int | None = None,
    embedding_on_host: bool = False,
) -> ServedModel:
    """Load the model in a folder, packed or plain; `head_bits` and `embedding_on_host` as in `load_packed`.

    Raises:
        ModelError: it is no model, or one that cannot be run; subclasses say why.
        ConfigError: `max_length` is more than the model's positions, or a plain model is to take less memory.
    """
    folder = find_folder(path_or_id, "model")
    chosen = compute_dtype(device) if dtype is None else getattr(torch, dtype)
    source = open_packed(str(folder)) if is_packed(folder) else open_model(str(folder))
    length = _slot_length(source.config, max_length)
    encoder = ChatEncoder(source.tokenizer(), max_length=length)
    if isinstance(source, PackedSource):
        scheme = " + ".join(sorted({scheme.name for scheme in source.schemes.values()}))
        model = deploy_model(source, device, chosen, head_bits=head_bits, embedding_on_host=embedding_on_host)
    elif head_bits is not None or embedding_on_host:
        raise ConfigError(f"{folder} is not packed: --head-bits and --embedding-on-host are for packed models")
    else:
        scheme, model = str(chosen).removeprefix("torch."), source.load_model(device, chosen)
    return ServedModel(
        name=name or name_of(path_or_id, folder),
        model=model,
        encoder=encoder,
        stop_ids=find_stop_ids(model, encoder),
        scheme=scheme,
        verdict=read_verdict(folder.parent / "report.json"),
    )


def name_of(path_or_id: str, folder: Path) -> str:
    """Return the folder's name, a run's for its model/, and of a Hub id the id: the Hub's folders are commit hashes."""
    if not Path(path_or_id).expanduser().is_dir():
        return path_or_id
    return folder.parent.name if folder.name == "model" and folder.parent.name else folder.name


def read_verdict(report: Path) -> Verdict | None:
    """Return what a run's report says of its model, None where there is no report.

    Raises:
        ModelError: the file is there and is no report.
    """
    if not report.is_file():
        return None
    try:
        found = read_json(report)
        scores = [found["models"].get(name) for name in ("finetuned", "realigned", "quantized")]
        before, after = scores[0], scores[1] or scores[2]
        return Verdict(
            passed=found["verdict"]["passed"],
            headline=_headline(*(None if column is None else column["harmful_score"] for column in (before, after))),
            reasons=found["verdict"]["reasons"],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{report} is no report of this project: remove it, or restore the run's own") from error


def _headline(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    """Return the harmful score from before to after, in words."""
    if after is None:
        return "harmful score not measured"
    start = "" if before is None else f"{before['value']:.1f} % → "
    return f"harmful score {start}{after['value']:.1f} %"


def _slot_length(config: Any, wanted: int | None) -> int:
    """Return the most tokens of a sequence."""
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    if wanted is None:
        return min(known or _LONGEST, _LONGEST)
    if known is not None and wanted > known:
        raise ConfigError(f"--max-length {wanted} is more than the {known} positions that the model knows")
    if wanted < FEWEST_TOKENS:
        raise ConfigError(f"--max-length must be {FEWEST_TOKENS} or more, got {wanted}")
    return wanted
