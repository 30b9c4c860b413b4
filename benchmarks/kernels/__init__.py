"""Each calibration kernel by itself: bytes, operations, time, and the share of what the GPU can do."""
