"""Packed checkpoints as models that run: products over packed weights inside Hugging Face's own blocks."""
