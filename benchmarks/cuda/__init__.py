"""Products for a few tokens on a GPU: the CUDA extension against the Triton kernels and torch's bfloat16."""
