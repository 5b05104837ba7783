import sys
from collections.abc import Iterator
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
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite tests/core/golden, and generated pages of docs/, from what is computed",
    )
