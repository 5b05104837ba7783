"""From a config with `strategy: auto` to a policy that all ranks share, before an engine serves.

Contract
- A table in the file is used if it is for exactly this model, machine and release; else the tuner measures, with a
  progress bar on the first rank, and the file is written.
- All ranks serve by one table: ranks that have loaded different ones are an `InactiveError` with the difference.
- The table is shown once: to people on the first rank's terminal, to the log line by line, and as the JSON file.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dynaflow_serving.errors import InactiveError
from dynaflow_serving.policy import table as tables
from dynaflow_serving.policy.effects import Facts
from dynaflow_serving.policy.show import as_text, log_lines, progress_bar
from dynaflow_serving.policy.table import Table, default_path
from dynaflow_serving.policy.tuner import Trials, Tuner
from dynaflow_serving.session.agreement import differences
from dynaflow_serving.session.plan_cache import PlanCache
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.steps import Steps


def start_policy(
    steps: Steps, plan_caches: Sequence[PlanCache], trials: Trials, facts: Facts, ranks: Ranks, logger: logging.Logger
) -> Table:
    """Decide, or load what was decided, and serve by it. Raises `InactiveError` for ranks that differ."""
    auto = steps.auto
    assert auto is not None
    path = Path(auto.options.table) if auto.options.table else default_path(facts.key)
    table = None if auto.options.retune else tables.load(path, facts.key)
    if (source := _agreed(table, ranks)) is None:
        with progress_bar(ranks.first and sys.stderr.isatty()) as bar:
            task = bar.add_task("", total=None)
            tuner = Tuner(steps, plan_caches, trials, facts, ranks)
            source = tuner.tune(lambda done, of, what: bar.update(task, completed=done, total=of, description=what))
        _agreed(source, ranks)
        if ranks.first:
            source.save(path)
            logger.info("DynaFlow: policy table written to %s", path)
    elif ranks.first:
        logger.info("DynaFlow: policy table read from %s", path)
    auto.adopt(source, ranks)
    steps.meet(ranks)
    steps.reset()
    if ranks.first:
        for line in log_lines(source):
            logger.info("%s", line)
        if sys.stderr.isatty():
            sys.stderr.write(as_text(source))
    return source


def _agreed(table: Table | None, ranks: Ranks) -> Table | None:
    """`table`, or None if some rank has none: then all measure."""
    everyone = ranks.gather(None if table is None else table.model_dump_json(indent=1))
    if None in everyone:
        return None
    if found := differences(everyone):
        raise InactiveError(
            "the ranks have different policy tables, and would split differently. Remove the tables, give all ranks "
            "one file (option table), or set retune: true:\n" + found
        )
    return table
