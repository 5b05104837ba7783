import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

# With --import-mode=importlib folders are no packages: support modules are imported by their bare names,
# and benchmarks from the root of the checkout, because it is no part of the package.
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2])]


@pytest.fixture(autouse=True)
def registered_strategies() -> Iterator[None]:
    """What a test registers is gone after it: other tests go through all strategies."""
    from dynaflow_serving.strategies import strategy_names
    from dynaflow_serving.strategy.registry import STRATEGIES

    strategy_names()  # the shipped ones are there
    before = dict(STRATEGIES)
    yield
    STRATEGIES.clear()
    STRATEGIES.update(before)


@pytest.fixture
def no_grad() -> Iterator[None]:
    """The test runs without gradients, as engines do."""
    import torch

    with torch.no_grad():
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/core/golden from what is computed")


COUNT = "count"


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Call it with lines for the end of the run: counts that a person should see."""
    return partial(record_property, COUNT)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    # Properties of a test's report, because with `-n` the test ran in another process.
    calls = [r for results in terminalreporter.stats.values() for r in results if getattr(r, "when", "") == "call"]
    if lines := [text for call in calls for name, text in call.user_properties if name == COUNT]:
        terminalreporter.section("counts")
        for line in lines:
            terminalreporter.line(line)
