import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# tests/core/support.py is imported by its bare name: with --import-mode=importlib folders are no packages.
sys.path.append(str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def registered_strategies() -> Iterator[None]:
    """What a test registers is gone after it: other tests go through all strategies."""
    from dynaflow_serving.strategies import STRATEGIES, strategy_names

    strategy_names()  # the shipped ones are there
    before = dict(STRATEGIES)
    yield
    STRATEGIES.clear()
    STRATEGIES.update(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/core/golden from what is computed")


REPORTS: list[str] = []


@pytest.fixture
def report():
    """Call it with lines for the end of the run: counts that a person should see."""
    return REPORTS.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if REPORTS:
        terminalreporter.section("counts")
        for line in REPORTS:
            terminalreporter.line(line)
