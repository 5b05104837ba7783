"""Prefix-cache hits between requests of one step.

Contract
- A request may be admitted on a cache hit for blocks that another request of the same step is only
  computing now. Un-split, all KV writes of a layer precede its attention; split, the reader's micro-batch
  must follow the writer's.
- `dependences` finds those (writer, reader) pairs from block tables and token counts; as `Batch.depends`
  they become ordering edges of the plan, or a veto where no order exists.
- Source: the condition of `GPUModelRunner._allow_microbatching` (vLLM 0.32), per pair instead of per step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np


def dependences(
    tokens: np.ndarray[Any, Any], computed: np.ndarray[Any, Any], tables: Iterable[tuple[int, np.ndarray[Any, Any]]]
) -> tuple[tuple[int, int], ...]:
    """(writer, reader) pairs.

    tokens, computed: per request, new tokens of this step and tokens in the cache before it.
    tables: per KV-cache group, (block size in tokens, block ids [requests, blocks]).
    """
    readers = np.flatnonzero(computed > 0)
    if readers.size == 0 or tokens.size < 2:
        return ()
    pairs: set[tuple[int, int]] = set()
    for block_size, table in tables:
        writers: dict[int, list[int]] = defaultdict(list)
        for request in range(tokens.size):
            start = int(computed[request]) // block_size
            stop = -(-(int(computed[request]) + int(tokens[request])) // block_size)
            for block in table[request, start:stop].tolist():
                writers[block].append(request)
        for reader in readers.tolist():
            # Whole blocks only: the partly filled last one is private to its request.
            for block in table[reader, : int(computed[reader]) // block_size].tolist():
                pairs |= {(w, reader) for w in writers.get(block, ()) if w != reader}
    return tuple(sorted(pairs))
