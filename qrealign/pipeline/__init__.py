"""The main job as stages: preflight, probe, calibrate, pack, evaluate, report."""
