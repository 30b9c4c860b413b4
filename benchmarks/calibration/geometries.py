"""The shapes of known models, by name: what a random stand-in of each is built from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from qrealign.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """One model's shape.

    `layers` are those of the stand-in; `full_layers` are the model's own, more where the stand-in is shortened.
    `head_size` is None where it is `hidden / heads`. `config` holds further fields of the Hugging Face configuration.
    """

    name: str
    model_type: str
    hidden: int
    intermediate: int
    layers: int
    full_layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    head_size: int | None = None
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """Name of the folder that holds the weights."""
        return self.name if self.layers == self.full_layers else f"{self.name}-{self.layers}-layers"

    @property
    def block_weights(self) -> int:
        """Weights in the linears of one block."""
        size = self.head_size or self.hidden // self.heads
        attention = 2 * self.hidden * size * (self.heads + self.key_value_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def head_weights(self) -> int:
        """Weights of the output head."""
        return self.hidden * self.vocabulary

    def with_layers(self, layers: int | None) -> Geometry:
        """Return the geometry with fewer blocks; None keeps all.

        Raises:
            ConfigError: the model does not have so many.
        """
        if layers is None:
            return self
        if not 1 <= layers <= self.full_layers:
            raise ConfigError(f"--layers {layers}: {self.name} has 1 to {self.full_layers}")
        return replace(self, layers=layers)

    def hugging_face(self) -> dict[str, Any]:
        """Return the fields of the Hugging Face configuration."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "head_dim": self.head_size or self.hidden // self.heads,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            **self.config,
        }


def _row(
    name: str,
    model_type: str,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    vocabulary: int,
    head_size: int | None = None,
    **config: Any,
) -> Geometry:
    return Geometry(
        name=name,
        model_type=model_type,
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        full_layers=layers,
        heads=heads,
        key_value_heads=key_value_heads,
        vocabulary=vocabulary,
        head_size=head_size,
        config=config,
    )


# From the models' own config.json.
_ROWS = (
    _row("llama-2-7b", "llama", 4096, 11008, 32, 32, 32, 32000, max_position_embeddings=4096, rms_norm_eps=1e-5),
    _row("llama-2-13b", "llama", 5120, 13824, 40, 40, 40, 32000, max_position_embeddings=4096, rms_norm_eps=1e-5),
    _row("llama-2-70b", "llama", 8192, 28672, 80, 64, 8, 32000, max_position_embeddings=4096, rms_norm_eps=1e-5),
    _row("llama-3-8b", "llama", 4096, 14336, 32, 32, 8, 128256, max_position_embeddings=8192, rms_norm_eps=1e-5),
    _row("qwen2.5-7b", "qwen2", 3584, 18944, 28, 28, 4, 152064, max_position_embeddings=32768, rms_norm_eps=1e-6),
    _row("gemma-2-9b", "gemma2", 3584, 14336, 42, 16, 8, 256000, 256, tie_word_embeddings=True, rms_norm_eps=1e-6),
    # No model: small enough for tests on a CPU.
    _row("tiny", "llama", 128, 192, 2, 4, 2, 4096, max_position_embeddings=512, rms_norm_eps=1e-5),
)
GEOMETRIES: dict[str, Geometry] = {row.name: row for row in _ROWS}


def find_geometry(name: str, layers: int | None = None) -> Geometry:
    """Return a geometry by name, shortened to `layers` where given.

    Raises:
        ConfigError: there is none of this name, or it has fewer layers.
    """
    if name not in GEOMETRIES:
        raise ConfigError(f"unknown geometry {name!r}: use one of {', '.join(GEOMETRIES)}")
    return GEOMETRIES[name].with_layers(layers)
