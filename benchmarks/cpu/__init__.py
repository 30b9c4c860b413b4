"""Linear layers on a CPU: the packed products against torch's own int8, int4 and bfloat16 paths."""
