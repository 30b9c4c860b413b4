"""Fake quantization inside Hugging Face's own blocks, and the frozen layers that it ends in."""
