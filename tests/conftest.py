"""What the tests of several engines share."""

import random

import pytest


def pytest_collection_modifyitems(items):
    """A test whose engine has several ranks has the machine for itself."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if max(parameters.get("tp", 1), parameters.get("ranks", 1)) > 1:
            item.add_marker("alone")


@pytest.fixture(scope="session")
def model_path():
    """`model_path(kind)`: a tiny model made locally."""
    from dynaflow_serving.bench.tiny_models import make_tiny_model

    return lambda kind: str(make_tiny_model(kind))


@pytest.fixture(scope="session")
def prompts():
    """Token ids of 12 mixed lengths; every third request shares a long prefix with the first."""
    draw = random.Random(0)
    shared = [draw.randrange(10, 2000) for _ in range(48)]
    return [
        (shared if i % 3 == 0 else []) + [draw.randrange(10, 2000) for _ in range(draw.choice([3, 9, 17, 33, 70]))]
        for i in range(12)
    ]
