import sys
from pathlib import Path

# tests/core/support.py and tests/gpu/gpu_support.py are imported by their bare names.
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "core")]
