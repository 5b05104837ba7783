import sys
from pathlib import Path

import pytest

# tests/core/support.py is imported by its bare name: with --import-mode=importlib folders are no packages.
sys.path.append(str(Path(__file__).parent))


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
