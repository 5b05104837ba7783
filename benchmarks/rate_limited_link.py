"""Two network namespaces joined by a rate-limited link: an emulated network between two processes of one machine.

Contract
- The link needs root and iproute2 (`ip`, `tc`); `unusable()` says in words what is missing.
- The limit (token bucket, `tc tbf`) is on the bytes that each side sends. `set_rate` changes it from inside a namespace
  while processes run.
- Leaving the context removes namespaces and interfaces, whatever happened.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

INTERFACE = "dynaflow"  # the name of the link inside each namespace
SEGMENT_BYTES = 16384  # what TCP hands down at a time; smaller pieces cost CPU at every arrival
BURST_KB = 32  # what may leave at once: at least a segment; a large one would hide communication after every pause


@dataclass(frozen=True)
class Side:
    """One end of the link."""

    namespace: str
    address: str

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *words]


def unusable() -> str:
    """Return why a link cannot be made here; "" if it can."""
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} not found: install iproute2 (apt-get install iproute2)"
    if os.geteuid() != 0:
        return "network namespaces and traffic control need root: run this as root"
    return ""


@contextlib.contextmanager
def link() -> Iterator[tuple[Side, Side]]:
    """Make two namespaces and the link between them, which has no limit yet.

    Raises:
        OSError: A command failed; the message names it.
    """
    tag = f"{os.getpid():x}"
    sides = tuple(Side(f"dynaflow-{tag}-{i}", f"10.77.0.{i + 1}") for i in range(2))
    with contextlib.ExitStack() as stack:
        for side in sides:
            _run("ip", "netns", "add", side.namespace)
            stack.callback(subprocess.run, ["ip", "netns", "del", side.namespace], check=False)
        ends = [f"df{tag}{i}"[:15] for i in range(2)]
        _run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for side, end in zip(sides, ends, strict=True):
            _run("ip", "link", "set", end, "netns", side.namespace, "name", INTERFACE)
            _run(*side.command("ip", "addr", "add", f"{side.address}/24", "dev", INTERFACE))
            _run(*side.command("ip", "link", "set", "lo", "up"))
            size = ("gso_max_size", str(SEGMENT_BYTES))
            _run(*side.command("ip", "link", "set", INTERFACE, *size))
            _run(*side.command("ip", "link", "set", INTERFACE, "up"))
        yield sides[0], sides[1]


def set_rate(mbit: float) -> None:
    """Limit the bytes that this process's namespace sends to `mbit` megabit per second; 0 removes the limit."""
    subprocess.run(["tc", "qdisc", "del", "dev", INTERFACE, "root"], check=False, stderr=subprocess.DEVNULL)
    if mbit:
        limit = ("rate", f"{mbit}mbit", "burst", f"{BURST_KB}kb", "latency", "100ms")
        _run("tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *limit)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
