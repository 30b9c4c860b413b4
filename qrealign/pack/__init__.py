"""Codes into a checkpoint that servers load, the proof that it holds them, and which servers take it."""
