"""What an example of examples/ says that it prints: the line after "It prints: " of its docstring."""

from __future__ import annotations

import re
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def said_by(file: Path) -> str:
    """Return what `file` says that it prints."""
    (line,) = re.findall(r"^It prints: (.*)$", file.read_text(), re.MULTILINE)
    return str(line)
