"""What runs on the two ranks of `test_policy`: importable there by name."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist
from policy_support import BATCH, Engine, per_token

from dynaflow_serving.errors import InactiveError
from dynaflow_serving.policy.bucket import bucket_of
from dynaflow_serving.policy.start import start_policy
from dynaflow_serving.policy.table import Decision, Table, Trial
from dynaflow_serving.session.ranks import Ranks


def table(candidate: str) -> Table:
    trial = Trial(candidate="nanoflow x2", ratios=[1.3])
    decision = Decision(**bucket_of(BATCH)._asdict(), candidate=candidate, noise=0.05, trials=[trial])
    return Table(key={"model": "chain", "device": "here"}, decisions=[decision])


def different_tables(folder: Path) -> str:
    """Each rank finds a table for its key on its own disk, and they differ."""
    rank = dist.get_rank()
    file = folder / f"table{rank}.json"
    table("nanoflow x2" if rank else "").save(file)
    engine = Engine(per_token, ranks=Ranks(dist.group.WORLD), table=str(file))
    try:
        start_policy(engine.session, engine, lambda: engine.facts, engine.ranks)
    except InactiveError as error:
        text = str(error)
        told = "different policy tables" in text and '+   "candidate": "nanoflow x2"' in text
        return "as expected" if told and not engine.ran else text
    return "no error"


def guard_of_one_rank(folder: Path) -> str:
    """Only rank 1 finds its candidate slow: both switch off, after the same step."""
    slow = dist.get_rank() == 1
    engine = Engine(lambda tokens: per_token(tokens) * (3 if slow and tokens < 64 else 1), guard_window=16)
    engine.selector.serve_by(table("nanoflow x2"), engine.session, Ranks(dist.group.WORLD))
    for _ in range(40):
        engine.step(BATCH)
    counted = [None, None]
    dist.all_gather_object(counted, (engine.session.counts.split, dict(engine.session.counts.unsplit)))
    same = counted[0] == counted[1]
    off = engine.selector.switched_off
    return "as expected" if same and off == 1 else f"{counted} {off}"
