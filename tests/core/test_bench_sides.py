"""The sides of a comparison: what the command line asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynaflow_serving.bench.sides import make_sides
from dynaflow_serving.errors import ConfigError


def names(*sources: str, n: int | None = None, options: tuple[str, ...] = ()) -> list[str]:
    return [side.name for side in make_sides(sources, n, options)]


def test_stock_and_sequential_stand_beside_every_strategy() -> None:
    assert names() == ["stock", "sequential x3", "comm_overlap x3"]
    assert names("comm_overlap", "nanoflow", n=2) == ["stock", "sequential x2", "comm_overlap x2", "nanoflow x2"]
    assert names("sequential", "comm_overlap", n=4) == ["stock", "sequential x4", "comm_overlap x4"]
    assert names("auto") == ["stock", "auto"]  # nobody knows before how many micro-batches it takes
    assert names("auto", "comm_overlap") == ["stock", "sequential x3", "auto", "comm_overlap x3"]
    without = make_sides(["auto", "comm_overlap"], sequential=False)
    assert [side.name for side in without] == ["stock", "auto", "comm_overlap x3"]


def test_sequential_cuts_as_the_strategy_does() -> None:
    _, sequential, strategy = make_sides(["nanoflow"], 2, ["min_tokens=7"])
    assert sequential.options == {"micro_batches": 2, "min_tokens": 7}
    assert strategy.options["min_tokens"] == 7 and strategy.options["micro_batches"] == 2


def test_a_file_keeps_its_options_and_a_name_gets_those_of_the_command(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("strategy: comm_overlap\noptions: {micro_batches: 2}\nexecutor: sequential\n")
    side = make_sides([str(file)])[-1]
    assert side.options == {"micro_batches": 2, "min_tokens": 2048}  # the strategy's own default
    assert make_sides([str(file)])[1].config.executor == "sequential"  # type: ignore[union-attr]
    assert make_sides(["comm_overlap"])[-1].options == {"micro_batches": 3, "min_tokens": 1}


def test_an_option_is_for_the_strategies_that_have_it() -> None:
    auto, fixed = make_sides(["auto", "comm_overlap"], None, ["budget_seconds=5", "min_tokens=9"])[2:]
    assert auto.options["budget_seconds"] == 5 and fixed.options["min_tokens"] == 9
    assert auto.options["retune"] is True  # decisions on disk may be of another link


@pytest.mark.parametrize(
    ("sources", "n", "options", "message"),
    [
        (
            ["comm_overlap"],
            None,
            ["min_token=1"],
            "unknown option of comm_overlap 'min_token'. Did you mean 'min_tokens'",
        ),
        (["dual_batch"], 3, [], "unknown option of dual_batch 'micro_batches'"),
        (["comm_overlap", "comm_overlap"], None, [], "comm_overlap x3 is given twice"),
        (["comm_overlap"], 0, [], "micro_batches"),
        (["nanflow"], None, [], "Did you mean 'nanoflow'"),
        (["auto"], None, ["budget_seconds=soon"], "budget_seconds"),
    ],
)
def test_what_is_wrong_is_named(sources: list[str], n: int | None, options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        make_sides(sources, n, options)
