"""Prompts, labels, chat templates and batches."""
