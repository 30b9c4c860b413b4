"""The sweep of quantized products over the linear layers of Llama-2-7B, beside other projects': see `__main__.py`."""
