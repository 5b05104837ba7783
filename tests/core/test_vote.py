"""Ranks with a batch each split their steps alike, or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import ranks

from dynaflow_serving.capture.examples import example_capture
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.session.ranks import Ranks
from dynaflow_serving.session.vote import OUTVOTED, Vote
from dynaflow_serving.strategy.splitting import cut_at_requests, whole

EVEN, UNEVEN = Batch((8, 8)), Batch((5, 7, 4))
DEPENDENT = Batch((8, 8), depends=((0, 1),))


class Table:
    """Ranks of one process, a thread each, exchange numbers here."""

    def __init__(self, size: int) -> None:
        self.said: list[list[int]] = [[] for _ in range(size)]
        self.barrier = threading.Barrier(size, timeout=100)

    def rank(self, number: int) -> Ranks:
        table = self

        class OfThread(Ranks):
            def gather_numbers(self, values: Sequence[int]) -> list[list[int]]:
                table.said[number] = list(values)
                table.barrier.wait()
                everyone = [list(said) for said in table.said]
                table.barrier.wait()
                return everyone

        return OfThread()


def together(*tasks: Callable[[Ranks], Any]) -> list[Any]:
    """Return what the tasks return, each run as one rank."""
    table = Table(len(tasks))
    with ThreadPoolExecutor(len(tasks)) as pool:
        return [future.result() for future in [pool.submit(t, table.rank(i)) for i, t in enumerate(tasks)]]


def voter(batch: Batch, split: Split | None = None, steps: int = 0) -> Callable[[Ranks], Any]:
    def vote(ranks: Ranks) -> tuple[Split, int, list[list[int]]]:
        mine = Vote(ranks, most=3)
        decided = mine.cast(batch, split or cut_at_requests(batch, 2), steps)
        return *decided, mine.tokens

    return vote


def test_ranks_that_cut_alike_split_and_know_the_tokens_of_each_other() -> None:
    for split, _, tokens in together(voter(EVEN), voter(UNEVEN)):
        assert len(split.micro_batches) == 2 and tokens == [[8, 8], [5, 11]]


@pytest.mark.parametrize(
    "other",
    [voter(Batch((9,))), voter(UNEVEN, cut_at_requests(UNEVEN, 3)), voter(DEPENDENT), lambda r: Vote(r, 3).abstain()],
    ids=["whole", "three-micro-batches", "dependence", "idle"],
)
def test_one_rank_that_cuts_otherwise_keeps_all_whole(other: Callable[[Ranks], Any]) -> None:
    (split, _, tokens), answer = together(voter(EVEN), other)
    assert split == whole(EVEN, OUTVOTED) and tokens == []
    if answer is not None:
        assert len(answer[0].micro_batches) == 1


def test_a_rank_keeps_its_own_reason() -> None:
    (_, (split, *_)) = together(voter(EVEN), voter(Batch((9,))))
    assert split.reason == "one request"


def test_planned_steps_are_counted_alike() -> None:
    assert [steps for _, steps, _ in together(voter(EVEN, steps=4), voter(EVEN, steps=7))] == [7, 7]


def session_of(batches: Sequence[Batch | None]) -> Callable[[Ranks], Any]:
    """A rank whose session runs a step of each batch, or an idle one for None."""
    session = ranks.session()
    session.add(example_capture("llama"))

    def run(exchange: Ranks) -> Any:
        session.vote = Vote(exchange, session.selector.max_micro_batches)
        numbers = []
        for batch in batches:
            if batch is None:
                session.vote.abstain()
                continue
            with session.step(batch) as step:
                numbers.append(step.number)
        return session.report().steps.split, numbers

    return run


def test_sessions_split_and_number_their_steps_alike() -> None:
    one = session_of([EVEN, EVEN, Batch((9,)), EVEN])
    other = session_of([EVEN, None, EVEN, EVEN])
    assert together(one, other) == [(2, [1, 0, 0, 2]), (2, [1, 0, 2])]
