"""Prefix-cache hits between requests of one step.

Contract
- A request may be admitted on a cache hit for blocks that another request of the same step is only
  computing now. Un-split, all KV writes of a layer precede its attention; split, the reader's micro-batch
  must follow the writer's.
- `dependences` finds those (writer, reader) pairs from block tables and token counts; as `Batch.depends`
  they become ordering edges of the plan, or a veto where no order exists.
- Only a request that joins the batch in this step can read such blocks: later ones were filled in earlier
  steps. A step without one costs nothing here.
- Source: the condition of `GPUModelRunner._allow_microbatching` (vLLM 0.32), per pair instead of per step, and
  also for a hit that leaves a single token to compute, which looks like a decode.
"""

from __future__ import annotations

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
    """(writer, reader) pairs of requests.

    tokens, computed: per request, new tokens of this step and tokens in the cache before it.
    joined: the requests that are new (or resumed) in this step.
    tables: per KV-cache group, (block size in tokens, block ids of each request in order).
    """
    readers = [r for r in joined if computed[r] > 0]
    if not readers or tokens.size < 2:
        return ()
    pairs: set[tuple[int, int]] = set()
    for block_size, table in tables:
        writers: dict[int, list[int]] = defaultdict(list)
        for request in range(tokens.size):
            start = int(computed[request]) // block_size
            stop = -(-(int(computed[request]) + int(tokens[request])) // block_size)
            for block in table[request][start:stop]:
                writers[block].append(request)
        for reader in readers:
            # Whole blocks only: the partly filled last one is private to its request.
            for block in table[reader][: int(computed[reader]) // block_size]:
                pairs |= {(w, reader) for w in writers.get(block, ()) if w != reader}
    return tuple(sorted(pairs))
