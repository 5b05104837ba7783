"""The GPU benchmark suite: `python -m benchmarks.gpu --json DIR [--quick]`, from the root of a checkout."""
