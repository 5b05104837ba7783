"""`TraceWriter` writes traces of real steps, one file each.

Contract
- A sampled split step runs the same plan, bound with a tracer. Its Chrome trace has operator names, micro-batches and
  streams, and the overlap that follows from the spans. `Timeline.from_dict` reads its `timeline`.
- Each rank writes traces of at most `limit` steps. A folder that cannot be made is an error at start-up.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynaflow_serving.config import TraceOptions
from dynaflow_serving.core.timeline import Timeline, chrome_trace
from dynaflow_serving.errors import ConfigError
from dynaflow_serving.files import write_text
from dynaflow_serving.session.observers import Observer
from dynaflow_serving.session.step import Step


class TraceWriter(Observer):
    """This observer asks for traces of some split steps, and writes them."""

    def __init__(self, options: TraceOptions, rank: int) -> None:
        """Make the folder of the traces.

        Args:
            options: The folder, and how many steps are traced.
            rank: The rank of this worker, for the names of the files.

        Raises:
            ConfigError: The folder cannot be made.
        """
        self.options, self.rank, self.written = options, rank, 0
        try:
            Path(options.folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"trace: folder {options.folder!r} cannot be made: {error}") from None

    def decided(self, step: Step) -> None:
        due = step.number and (step.number - 1) % self.options.every == 0
        if due and self.written < self.options.limit:
            step.to_trace = True

    def traced(self, step: Step, timelines: Sequence[Timeline]) -> None:
        tokens = [b - a for a, b in (p.tokens for p in step.split.micro_batches)]
        facts = {"tokens": tokens, "requests": len(step.batch.tokens), "rank": self.rank}
        for i, timeline in enumerate(timelines):
            name = f"step{step.number:06d}-rank{self.rank}" + (f"-graph{i}" if len(timelines) > 1 else "")
            write_text(Path(self.options.folder, f"{name}.json"), _content(timeline, facts))
        self.written += 1


def _content(timeline: Timeline, facts: dict[str, Any]) -> str:
    return json.dumps(chrome_trace(timeline, {**facts, "timeline": timeline.as_dict()})) + "\n"
