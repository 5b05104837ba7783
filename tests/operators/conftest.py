import sys
from pathlib import Path

# The benchmarks are no part of the package: they are imported from the root of the checkout.
sys.path.append(str(Path(__file__).parents[2]))
