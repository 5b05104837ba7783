"""Whether the emulated nodes of `dynaflow bench --link` can be made here."""

from __future__ import annotations

import shutil
import subprocess


def why_no_link() -> str:
    """Return what is missing; "" if nothing is."""
    if missing := [tool for tool in ("unshare", "nsenter", "ip", "tc", "nstat") if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not found"
    refused = subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False).returncode
    return "network namespaces are not allowed here" if refused else ""
