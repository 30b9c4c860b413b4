"""Whole calibration runs of a named geometry, measured stage by stage: `python -m benchmarks.calibration`."""
