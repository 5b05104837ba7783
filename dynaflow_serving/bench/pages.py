"""What pages and pictures are made with: matplotlib's SVG, and jinja2's templates.

Contract
- Both packages are optional (`pip install 'dynaflow-serving[report]'`) and imported inside functions;
  `assert_installed` is for before anything runs.
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
    """Raise `DynaflowError` if one of `packages`, which `what` needs, is not installed."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise DynaflowError(
            f"{what} needs the packages {', '.join(packages)}; missing here: {', '.join(missing)}. "
            "Install them with: pip install 'dynaflow-serving[report]'"
        )


def templates(folder: Path) -> Any:
    """The jinja2 environment of `folder`: values are escaped, and one that is not given is an error."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def svg(figure: Figure) -> str:
    """The `<svg>` element of `figure`."""
    import matplotlib

    # Text stays text, which the browser's font draws; the salt makes equal figures equal files.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "dynaflow", "font.family": "sans-serif"}):
        output = io.StringIO()
        figure.savefig(output, format="svg", metadata={"Date": None, "Creator": None})
    text = output.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
