"""`dependences` finds prefix-cache hits between requests of one step.

Contract
- vLLM may admit a request on a cache hit for blocks that another request of the same step is only computing now.
- In an un-split step, all KV writes of a layer precede its attention. In a split one, the reader's micro-batch must
  follow the writer's.
- The (writer, reader) pairs follow from block tables and token counts. As `Batch.depends` they become ordering edges of
  the plan, or a veto where no order exists.
- Only a request that joins the batch in this step can read such blocks: those of other requests were filled in earlier
  steps. A step without a joining request costs nothing here.
- Source: the condition of `GPUModelRunner._allow_microbatching` (vLLM 0.32) is applied per pair instead of per step. It
  is also applied to a hit that leaves a single token to compute, which looks like a decode.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


def dependences(
    tokens: np.ndarray[Any, Any],
    computed: np.ndarray[Any, Any],
    joined: Sequence[int],
    tables: Iterable[tuple[int, Sequence[Sequence[int]]]],
) -> tuple[tuple[int, int], ...]:
    """Return the (writer, reader) pairs of requests, sorted.

    Args:
        tokens: The new tokens of each request in this step.
        computed: The tokens of each request that are in the cache before this step.
        joined: The requests that are new or resumed in this step.
        tables: (block size in tokens, block ids of each request in order) of each KV-cache group.
    """
    readers = [r for r in joined if computed[r] > 0]
    if not readers or tokens.size < 2:
        return ()
    pairs: set[tuple[int, int]] = set()
    for block_size, table in tables:
        writers: dict[int, list[int]] = defaultdict(list)
        for request in range(tokens.size):
            start = int(computed[request]) // block_size
            stop = math.ceil((int(computed[request]) + int(tokens[request])) / block_size)
            for block in table[request][start:stop]:
                writers[block].append(request)
        for reader in readers:
            # Only whole blocks are shared; a partly filled last block is private to its request.
            for block in table[reader][: int(computed[reader]) // block_size]:
                pairs |= {(w, reader) for w in writers.get(block, ()) if w != reader}
    return tuple(sorted(pairs))
