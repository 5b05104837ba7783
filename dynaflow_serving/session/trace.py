"""Traces of real steps, one file each.

Contract
- A sampled split step runs the same plan bound with a tracer; its Chrome trace has operator names, micro-batches and
  streams, and the overlap computed from the spans.
- At most `limit` files per rank; a folder that cannot be written is an error at start-up.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynaflow_serving.config import TraceOptions
from dynaflow_serving.core.timeline import Timeline, chrome_trace
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.files import write_text


class TraceWriter:
    def __init__(self, options: TraceOptions, rank: int) -> None:
        """Raises `ConfigError` if the folder cannot be made."""
        self.options, self.rank, self.written = options, rank, 0
        try:
            Path(options.folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"trace: folder {options.folder!r} cannot be made: {error}") from None

    def wants(self, split_step: int) -> bool:
        """Whether the `split_step`-th split step (from 1) is traced."""
        return self.written < self.options.limit and (split_step - 1) % self.options.every == 0

    def write(self, split_step: int, timelines: list[Timeline], facts: dict[str, Any]) -> None:
        for i, timeline in enumerate(timelines):
            name = f"step{split_step:06d}-rank{self.rank}" + (f"-graph{i}" if len(timelines) > 1 else "")
            path = Path(self.options.folder, f"{name}.json")
            write_text(path, json.dumps(chrome_trace(timeline, {**facts, "rank": self.rank})) + "\n")
        self.written += 1
