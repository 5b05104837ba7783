"""Pages that are made from code are those that the code makes, and links of the documentation lead somewhere."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import dynaflow_serving

DOCS = Path(__file__).parents[2] / "docs"
GENERATORS = ("command_line", "configuration", "metrics", "refusals", "releases", "strategy_pages")


@pytest.mark.parametrize("name", GENERATORS)
def test_generated_pages_are_current(
    name: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.syspath_prepend(str(DOCS / "generate"))
    pages = importlib.import_module(name).pages()
    if request.config.getoption("--update-golden", default=False):
        importlib.import_module("pages").write(pages)
    for page, text in pages.items():
        assert (DOCS / page).read_text() == text, f"if the change is right: python docs/generate/{name}.py"


def test_the_readme_takes_five_minutes() -> None:
    lines = (DOCS.parent / "README.md").read_text().splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120


def test_links_of_the_repository_lead_somewhere() -> None:
    root = DOCS.parent
    for page in [*root.glob("*.md"), *DOCS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#\s:]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(root)}: {target}"


def test_every_generator_is_tested() -> None:
    scripts = {f.stem for f in (DOCS / "generate").glob("*.py") if "def pages()" in f.read_text()}
    assert scripts == set(GENERATORS)


def test_the_api_page_has_every_public_name() -> None:
    text = (DOCS / "api.md").read_text()
    shown = {line.removeprefix("::: dynaflow_serving.") for line in text.splitlines() if line.startswith(":::")}
    assert set(dynaflow_serving.__all__) <= shown
