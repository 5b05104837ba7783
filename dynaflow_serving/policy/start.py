"""`start_policy` decides how an engine serves under `strategy: auto`, before it serves, on all ranks alike.

Contract
- Whatever the strategy, each kind of split that serving can meet is compared with an un-split step in a trial, unless
  tuning has done so. The first rank says what that cost.
- A table in the file is used if its key fits this model, machine and release exactly.
- Otherwise the tuner measures, with a progress bar on the first rank, or lines in its log where there is no terminal.
  It then writes the file.
- All ranks serve by one table. If they have read different ones, `InactiveError` shows the difference.
- The first rank shows the table once, on its terminal and line by line in the log.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dynaflow_serving.errors import InactiveError
from dynaflow_serving.policy.bucket import DECODE, bucket_of
from dynaflow_serving.policy.selector import AutoSelector
from dynaflow_serving.policy.show import as_text, log_lines, progress_bar
from dynaflow_serving.policy.side_effects import Facts
from dynaflow_serving.policy.table import Table, default_path, read_table
from dynaflow_serving.policy.tuner import Progress, Trials, Tuner
from dynaflow_serving.session.agreement import differences
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.session import Session

SECONDS_BETWEEN_LINES = 5.0  # of a tuning's progress in a log


def start_policy(session: Session, trials: Trials, facts: Callable[[], Facts], ranks: Ranks | None = None) -> None:
    """Tune, or read the decisions of an earlier tuning, and serve by them; check the splits that are in use.

    Steps are counted from here on. A session that has retired decides nothing.

    Args:
        session: All ranks have confirmed its programs. If its selector is not `auto`, nothing is decided.
        trials: The engine's way to run steps that no user asked for.
        facts: This returns the facts about the model. It is called only if something is decided.
        ranks: The ranks that decide alike; by default, those of the session.

    Raises:
        InactiveError: The ranks have different decisions.
    """
    if session.retired:
        session.reset()
        return
    ranks = ranks or session.ranks
    session.agree_over(ranks)
    table = None
    if isinstance(session.selector, AutoSelector):
        table = _serve_by_table(session, session.selector, trials, facts(), ranks)
    check_splits(session, trials)
    session.reset()
    if ranks.first:
        _show(session, table)


def check_splits(session: Session, trials: Trials) -> None:
    """Run a trial of each cut that is in use and has not been compared with an un-split step yet.

    It takes the smallest batch that is cut so, of prompts if there is one. Cuts that no trial gives, such as those of
    requests that share KV blocks, are compared in their first step while serving.
    """
    if session.check is None:
        return
    known = set().union(*(c.checked for c in session.plan_caches))
    batches = sorted(trials.batches(), key=lambda batch: (bucket_of(batch).kind == DECODE, sum(batch.tokens)))
    for candidate in session.selector.in_use:
        for batch in batches:
            split = session.selector.cut(batch, candidate)
            for plan_cache in session.plan_caches:
                split = plan_cache.allowed_split(batch, split)
            if len(split.micro_batches) > 1 and split.signature not in known:
                known.add(split.signature)
                with session.trial(candidate):
                    trials.run_step(batch)


def _show(session: Session, table: Table | None) -> None:
    """Say what was decided, and what the check has cost, on the terminal and in the log."""
    checked = "" if session.check is None else f"DynaFlow: {session.check.report()}"
    for line in [] if table is None else log_lines(table):
        session.logger.info("%s", line)
    if checked:
        session.logger.info("%s", checked)
    if table is not None and sys.stderr.isatty():
        sys.stderr.write(f"{as_text(table)}{checked}\n")


def _serve_by_table(session: Session, selector: AutoSelector, trials: Trials, known: Facts, ranks: Ranks) -> Table:
    """Serve by the decisions for `known`, which are read or made, and return them.

    Raises:
        InactiveError: The ranks have different decisions.
    """
    path = Path(selector.options.table) if selector.options.table else default_path(known.key)
    table = None if selector.options.retune else read_table(path, known.key)
    if (agreed := _agreed(table, ranks)) is None:
        with progress_bar(ranks.first and sys.stderr.isatty()) as bar:
            task = bar.add_task("", total=None)
            told = _told_in_log(session) if ranks.first and not sys.stderr.isatty() else None

            def tell(done: int, of: int, what: str) -> None:
                bar.update(task, completed=done, total=of, description=what)
                if told is not None:
                    told(done, of, what)

            agreed = Tuner(session, selector, trials, known, ranks).tune(tell)
        _agreed(agreed, ranks)
        if ranks.first:
            agreed.save(path)
            session.logger.info("DynaFlow: policy table written to %s", path)
    elif ranks.first:
        session.logger.info("DynaFlow: policy table read from %s", path)
    selector.serve_by(agreed, session, ranks, known)
    return agreed


def _told_in_log(session: Session) -> Progress:
    """Return what writes the progress of a tuning into the log, every few seconds."""
    last = -math.inf

    def tell(done: int, of: int, what: str) -> None:
        nonlocal last
        if what and time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            session.logger.info("DynaFlow tunes: %s (%d of %d kinds of batches are done)", what, done, of)

    return tell


def _agreed(table: Table | None, ranks: Ranks) -> Table | None:
    """Return `table`, or None if some rank has none, so that all ranks measure.

    Raises:
        InactiveError: The ranks have different tables.
    """
    everyone = ranks.gather(None if table is None else table.model_dump_json(indent=1))
    if None in everyone:
        return None
    if found := differences(everyone):
        raise InactiveError(
            "the ranks have different policy tables, and would split differently. Remove the tables, give all ranks "
            "one file (option table), or set retune: true:\n" + found
        )
    return table
