"""The names of streams that strategies share.

Contract
- A plan may have any streams: every name that a strategy gives makes one. A misspelt name would make a new stream, so
  use the constants.
- `COMPUTE` is the stream of the caller. `NETWORK` gets a high priority on CUDA.
- `CHUNKS` is for the collectives within an operator that a kernel runs in chunks, and no plan's. The plan may be using
  `NETWORK` meanwhile, and waits for the operator before it goes on with collectives of its group.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from dynaflow_serving.core.plan import COMPUTE_STREAM
from dynaflow_serving.core.program import Operator, Resource

COMPUTE: Final = COMPUTE_STREAM
NETWORK: Final = "network"
CHUNKS: Final = "chunks"


def default_stream(operators: Iterable[Operator]) -> str:
    """Return the stream of operators that are launched together: `NETWORK` if one of them is bound by the network."""
    return NETWORK if any(o.resource is Resource.NETWORK for o in operators) else COMPUTE
