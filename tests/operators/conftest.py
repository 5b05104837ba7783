import sys
from pathlib import Path

# With --import-mode=importlib folders are no packages: support modules are imported by their bare names,
# and benchmarks from the root of the checkout, because it is no part of the package.
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "core"), str(Path(__file__).parents[2])]
