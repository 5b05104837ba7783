"""The table of supported releases in docs/support.md, from the registry of integrations and pyproject.toml.

Contract
- `python docs/generate/releases.py` writes the page; `pages` has the rest of the contract.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator

from pages import ROOT, table, with_part, write

from dynaflow_serving.integrations import INTEGRATIONS

PAGE = "support.md"
TITLES = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "transformers": "Transformers",
    "megatron": "Megatron-LM",
    "xdit": "xDiT",
    "fastvideo": "FastVideo",
}


def pages() -> dict[str, str]:
    """Return the page with the table of releases."""
    return {PAGE: with_part(PAGE, "releases", table(("system", "package", "tested releases", "extra"), _rows()))}


def _rows() -> Iterator[tuple[str, ...]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, integration in INTEGRATIONS.items():
        assert name in project["optional-dependencies"], f"pyproject.toml has no extra {name!r}"
        yield TITLES[name], f"`{integration.package}`", ", ".join(integration.supported), f"`.[{name}]`"
    (torch,) = (dependency for dependency in project["dependencies"] if dependency.startswith("torch"))
    yield "PyTorch", "`torch`", torch.removeprefix("torch").replace(">=", "from ") + " on", "-"
    yield "Python", "-", project["requires-python"].replace(">=", "from ") + " on", "-"


if __name__ == "__main__":
    write(pages())
