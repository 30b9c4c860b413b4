"""What `benchmarks.tune` can tune: a module a part, each with TUNABLES."""
