"""qrealign: a fine-tuned language model in, a quantized, realigned, servable checkpoint and its proof out."""

__version__ = "0.1.0"
