"""Models on disk: opening, merging adapters, streaming blocks."""
