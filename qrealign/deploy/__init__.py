"""Packed checkpoints as models that run: products over packed weights inside Hugging Face's own blocks."""

CACHE_BITS = HEAD_BITS = (8,)  # of the codes that a cache, or a head, can be made of
