"""The tools that pages and pictures are made with: matplotlib's SVG, and jinja2's templates.

Contract
- Both packages are optional (`pip install 'dynaflow-serving[report]'`) and imported inside functions. A command calls
  `assert_installed` before anything runs.
- A page refers to nothing outside of itself, and equal figures give equal files.
"""

from __future__ import annotations

import importlib.util
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynaflow_serving.errors import DynaflowError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def assert_installed(what: str, *packages: str) -> None:
    """Check that the packages which `what` needs are installed.

    Raises:
        DynaflowError: One is missing; the message says how to install it.
    """
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise DynaflowError(
            f"{what} needs the packages {', '.join(packages)}; missing here: {', '.join(missing)}. "
            "Install them with: pip install 'dynaflow-serving[report]'"
        )


def templates(folder: Path) -> Any:
    """Return the jinja2 environment of a folder, which escapes values and refuses undefined ones."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def svg(figure: Figure) -> str:
    """Return the `<svg>` element of a figure."""
    import matplotlib

    # Text stays text, which the browser's font draws; the salt makes equal figures equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dynaflow", "font.family": "sans-serif"}):
        output = io.StringIO()
        figure.savefig(output, format="svg", metadata={"Date": None, "Creator": None})
    text = output.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
