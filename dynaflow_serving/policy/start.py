"""From a config with `strategy: auto` to a policy that all ranks share, before an engine serves.

Contract
- A table in the file is used if it is for exactly this model, machine and release; else the tuner measures, with a
  progress bar on the first rank, and the file is written.
- All ranks serve by one table: ranks that have loaded different ones are an `InactiveError` with the difference.
- The table is shown once: to people on the first rank's terminal, to the log line by line, and as the JSON file.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from dynaflow_serving.errors import InactiveError
from dynaflow_serving.policy import table as tables
from dynaflow_serving.policy.effects import Facts
from dynaflow_serving.policy.selector import AutoSelector
from dynaflow_serving.policy.show import as_text, log_lines, progress_bar
from dynaflow_serving.policy.table import Table, default_path
from dynaflow_serving.policy.tuner import Trials, Tuner
from dynaflow_serving.session.agreement import differences
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.session import Session


def start_policy(session: Session, trials: Trials, facts: Callable[[], Facts], ranks: Ranks | None = None) -> None:
    """Decide, or load what was decided, and serve by it. Steps are counted from here on.

    Args:
        session: whose programs all ranks have confirmed. Where its selector decides nothing, neither does this.
        trials: how the engine runs steps that no user asked for.
        facts: tells what the policy has to know of the model; it is asked only where something is decided.
        ranks: those that decide alike; default: those of the session.

    Raises:
        InactiveError: the ranks have different decisions.
    """
    ranks = ranks or session.ranks
    session.agree_over(ranks)
    selector = session.selector
    if not isinstance(selector, AutoSelector):
        return
    known = facts()
    path = Path(selector.options.table) if selector.options.table else default_path(known.key)
    table = None if selector.options.retune else tables.load(path, known.key)
    if (agreed := _agreed(table, ranks)) is None:
        with progress_bar(ranks.first and sys.stderr.isatty()) as bar:
            task = bar.add_task("", total=None)
            tuner = Tuner(session, selector, trials, known, ranks)
            agreed = tuner.tune(lambda done, of, what: bar.update(task, completed=done, total=of, description=what))
        _agreed(agreed, ranks)
        if ranks.first:
            agreed.save(path)
            session.logger.info("DynaFlow: policy table written to %s", path)
    elif ranks.first:
        session.logger.info("DynaFlow: policy table read from %s", path)
    selector.serve_by(agreed, session, ranks)
    session.reset()
    if ranks.first:
        for line in log_lines(agreed):
            session.logger.info("%s", line)
        if sys.stderr.isatty():
            sys.stderr.write(as_text(agreed))


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
