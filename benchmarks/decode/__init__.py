"""Whole models of real size: prefill, decode and memory of packed weights against Hugging Face in bfloat16."""
