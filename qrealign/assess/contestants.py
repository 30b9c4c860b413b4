"""The models of an evaluation, opened by path or Hub id, whether packed or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from qrealign.assess.options import AssessOptions
from qrealign.data.encode import ChatEncoder
from qrealign.demo import demo_paths
from qrealign.errors import ConfigError, ModelError
from qrealign.files import sha256_of_text
from qrealign.models.location import find_folder
from qrealign.models.source import ModelSource, open_model
from qrealign.pack.source import PackedSource, is_packed, open_packed
from qrealign.pipeline.models import ModelPool

PROMPT_TOKENS = 1024  # most tokens of a prompt with its answer's beginning
_FEWEST_TOKENS = 32  # left for the prompt


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model that is evaluated: `key` names its files, `given` is what the user called it, `title` a short name."""

    key: str
    given: str
    title: str
    source: ModelSource
    encoder: ChatEncoder

    def load(self, pool: ModelPool) -> PreTrainedModel:
        """Return the model with its weights."""
        if isinstance(self.source, PackedSource):
            return pool.packed(self.key, self.source)
        return pool.full_precision(self.key, self.source)

    def identity(self, pool: ModelPool) -> str:
        """Return a SHA-256 over what decides the model's answers beside the questions.

        A question's key holds its ids, so neither the system text nor the longest prompt stands here.
        """
        tokenizer = self.encoder.tokenizer
        generation = self.source.path / "generation_config.json"  # names ids that end an answer, as the tokenizer does
        return sha256_of_text(
            self.source.fingerprint(),
            ChatEncoder(tokenizer, max_length=PROMPT_TOKENS).fingerprint(),
            str(tokenizer.eos_token_id),
            generation.read_text(encoding="utf-8", errors="replace") if generation.is_file() else "",
            pool.device.type,
            str(pool.dtype),
        )


def open_contestants(options: AssessOptions) -> list[Contestant]:
    """Open the model and the one to compare it with, where there is one; no weights are read.

    Raises:
        ConfigError: the answers would leave no room for a prompt.
        ModelError: a model, adapter or tokenizer cannot be used; subclasses say why.
    """
    demo = demo_paths()
    named = options.model is not None
    model, adapter = (options.model, options.adapter) if named else (str(demo.aligned), str(demo.adapter))
    found = [_contestant("model", str(model), adapter, options)]
    if options.against is not None:
        found.append(_contestant("against", options.against, options.against_adapter, options))
    if len({one.title for one in found}) < len(found):
        found = [replace(one, title=f"{one.given} ({one.key})") for one in found]
    return found


def open_any(path_or_id: str, adapter: str | None) -> ModelSource:
    """Open a plain or packed model.

    Raises:
        ModelError: it cannot be used, or an adapter was given for a packed one.
    """
    folder = find_folder(path_or_id, "model")
    if not is_packed(folder):
        return open_model(str(folder), adapter=adapter)
    if adapter is not None:
        raise ModelError(
            f"{path_or_id} is packed, and an adapter cannot be merged into codes: give the model it was packed from"
        )
    return open_packed(str(folder))


def _contestant(key: str, given: str, adapter: str | None, options: AssessOptions) -> Contestant:
    source = open_any(given, adapter)
    positions = getattr(source.config, "max_position_embeddings", None) or PROMPT_TOKENS + options.max_new_tokens
    length = min(PROMPT_TOKENS, positions - options.max_new_tokens)
    if length < _FEWEST_TOKENS:  # beyond its positions a model fails or, worse, goes on with nonsense
        raise ConfigError(
            f"--max-new-tokens {options.max_new_tokens} leaves a prompt {max(0, length)} of the {positions} positions "
            f"of {given}, and it needs {_FEWEST_TOKENS}: ask for at most {positions - _FEWEST_TOKENS}"
        )
    encoder = ChatEncoder(source.tokenizer(), max_length=length, system=options.system)
    # A model of the Hub lies in a folder that is called by its commit.
    name = source.name if Path(given).expanduser().is_dir() else source.name.replace(source.path.name, given, 1)
    return Contestant(key=key, given=given, title=name, source=source, encoder=encoder)
