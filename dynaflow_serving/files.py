"""These functions write the files that we leave on a machine.

Contract
- A file is complete or absent, because it is written beside its place and then moved there.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def cache_directory() -> Path:
    """Return `$XDG_CACHE_HOME/dynaflow_serving`, or `~/.cache/dynaflow_serving` where the variable is not set."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "dynaflow_serving"


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, and make its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, scratch = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        os.chmod(scratch, 0o644)  # mkstemp's 0600 would stay after the rename
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
