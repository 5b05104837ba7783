"""Whatever a model computes, split and un-split must agree: PyTorch's operator samples and random programs.

python -m benchmarks.independence operators --json FILE [--before FILE]
python -m benchmarks.independence programs --count 10000
"""
