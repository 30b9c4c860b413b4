"""Do the Triton kernels fit the GPUs that users have? Compiled for each of them without one."""
