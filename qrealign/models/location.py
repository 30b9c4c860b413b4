"""From what a user names, a path or a Hub id, to a folder, and from the folder to a usable configuration."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from qrealign.errors import ModelError, UnsupportedArchitectureError

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
_HUB_FILES_LEFT = ["original/*", "consolidated*", "onnx/*"]


def find_folder(path_or_id: str, what: str) -> Path:
    """Return the local folder of a path, or of a Hub id after downloading it; `what` names it in messages.

    Raises:
        ModelError: neither a folder here nor an id that the Hub can give.
    """
    path = Path(path_or_id).expanduser()
    if os.path.isdir(path):  # Path.is_dir() raises where a name is too long or a folder is closed
        return path.resolve()
    if os.path.exists(path):
        raise ModelError(f"{what} {path_or_id} is a file: give the folder that holds config.json and the weights")
    if not _HUB_ID.fullmatch(path_or_id):
        raise ModelError(f"{what} {path_or_id} does not exist: give a folder, or a Hub id such as org/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_id, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_FILES_LEFT))
    except Exception as error:  # the Hub's client raises many kinds: repository, network, offline, validation, disk
        raise ModelError(
            f"{what} {path_or_id} is neither a folder here nor a model that the Hugging Face Hub could give "
            f"({type(error).__name__}): check the name, the connection, and that you are logged in if it is gated"
        ) from error


def load_config(folder: Path, *, packed: bool = False) -> Any:
    """Return the Hugging Face configuration of the model in `folder`.

    `packed` takes that of a compressed-tensors checkpoint, and returns it without its `quantization_config`.

    Raises:
        ModelError: no config.json, a broken one, or that of a quantized model that was not asked for.
        UnsupportedArchitectureError: not a decoder-only text model that transformers knows.
    """
    raw = read_config(folder)
    _check_kind(folder, {key: value for key, value in raw.items() if not (packed and key == "quantization_config")})
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers import __version__ as version

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds on a configuration it cannot build
        kind = raw.get("model_type")
        raise UnsupportedArchitectureError(
            f"{folder / 'config.json'}: transformers {version} cannot build a configuration of model type {kind!r}: "
            "use a decoder-only model of a type that it knows, with an intact config.json"
        ) from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedArchitectureError(
            f"{folder} is of model type {config.model_type!r}, which has no decoder-only language model: give a "
            "causal LM"
        )
    if packed:
        del config.quantization_config
    return config


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json as a dictionary.

    Raises:
        ModelError: there is none, or it is broken.
    """
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(
                f"{folder} is an adapter, not a model: pass it with --adapter, and the model it was trained on "
                "with --model"
            )
        raise ModelError(
            f"{folder} is no model folder: it has no config.json; give a folder that save_pretrained wrote"
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise ModelError(f"{file} is no valid JSON: copy the model again") from None
    if not isinstance(raw, dict) or not raw.get("model_type"):
        raise ModelError(
            f"{file} names no model_type, so it is no configuration of a transformers model: give a folder that "
            "save_pretrained wrote"
        )
    return raw


def _check_kind(folder: Path, raw: dict[str, Any]) -> None:
    """Refuse configurations that are known to be outside of what this project does."""
    if raw.get("quantization_config"):
        settings = raw["quantization_config"]
        method = settings.get("quant_method") if isinstance(settings, dict) else None
        raise ModelError(
            f"{folder} is quantized already ({method or 'unknown method'}): give the fine-tuned model in "
            "bfloat16, float16 or float32"
        )
    if raw.get("text_config") or raw.get("vision_config") or raw.get("audio_config"):
        raise UnsupportedArchitectureError(
            f"{folder} is a multimodal model ({raw['model_type']}), and only text models are handled: save "
            "its language model alone (as AutoModelForCausalLM with the text configuration) and give that folder"
        )
    if raw.get("auto_map"):
        raise UnsupportedArchitectureError(
            f"{folder} needs code of its own (auto_map in config.json), which is not run: use a type that "
            "transformers knows"
        )
    if raw.get("is_encoder_decoder"):
        raise UnsupportedArchitectureError(
            f"{folder} is an encoder-decoder model ({raw['model_type']}): give a decoder-only one"
        )
