"""Two emulated nodes: two network namespaces of this machine, joined by a link of a given rate.

Contract
- No root is needed: a user namespace of one's own lets an ordinary user make network namespaces. `enter` runs this
  process's command again in the first one, which is node 0. What this process starts is on node 0; `Link.command`
  starts something on node 1.
- Node 1 has a network and a /dev/shm of its own: engines ask shared memory whether two ranks are on one node.
- Namespaces end with the processes in them, so nothing is left behind, however this process ends.
- The rate (token bucket, `tc tbf`) limits the bytes that each side sends.
- The link flatters nobody. TCP does not restart slowly after a pause, and the queue holds the largest message. With
  `tcp_defaults` both are as the kernel has them, which slows down senders that pause: mostly the stock system.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence

from dynaflow_serving.errors import ConfigError, DynaflowError

NODES = 2
ONE_NODE = None  # stands for the rate of a run on this machine alone, beside one on two nodes
INTERFACE = "dynaflow"  # the name of the link on each node
ADDRESSES = ("10.77.0.1", "10.77.0.2")
SEGMENT_BYTES = 16384  # what TCP hands down at a time; smaller pieces cost CPU at every arrival
BURST_KB = 32  # what may leave at once: at least a segment; a large one would hide communication after every pause
QUEUE_BYTES = 256 << 20  # more than the largest message
DEFAULT_QUEUE = "100ms"  # with `tcp_defaults`
LEAST_MBIT, MOST_MBIT = 1.0, 40_000.0
_INSIDE = "DYNAFLOW_BENCH_NODE"  # this variable tells the command that it runs on node 0


def place(mbit: float | None) -> str:
    """Return where a run is, in words: over a link of that rate, over one without a limit, or on one node."""
    if mbit is ONE_NODE:
        return "one node"
    return f"{mbit:g} Mbit/s" if mbit else "no limit"


def check_rates(rates: Sequence[float]) -> None:
    """Check the rates of a link in megabit per second; 0 is no limit.

    Raises:
        ConfigError: A rate is not possible.
    """
    for rate in rates:
        if rate and not LEAST_MBIT <= rate <= MOST_MBIT:
            raise ConfigError(
                f"--link {rate:g}: a rate in megabit per second from {LEAST_MBIT:g} to {MOST_MBIT:g}, or 0 for no limit"
            )


def enter() -> None:
    """Go on in the namespace of node 0: unless this process is there, run its command again in there.

    Raises:
        DynaflowError: Namespaces cannot be made here; the message says what is missing.
    """
    if os.environ.get(_INSIDE) == str(os.getpid()):
        return
    if missing := [tool for tool in ("unshare", "nsenter", "ip", "tc", "nstat") if shutil.which(tool) is None]:
        raise DynaflowError(
            f"--link needs {' and '.join(missing)}, not found here: install the packages iproute2 and util-linux "
            "(apt-get install iproute2 util-linux). Without --link the same comparison runs on this machine alone."
        )
    words = ["unshare", "--user", "--map-root-user", "--net"]
    refused = subprocess.run([*words, "true"], capture_output=True, text=True, check=False)
    if refused.returncode:
        raise DynaflowError(
            f"--link needs network namespaces, which are not allowed here ({refused.stderr.strip()}). An ordinary user "
            "may make them where the kernel has user.max_user_namespaces above 0 and, on Ubuntu, "
            "kernel.apparmor_restrict_unprivileged_userns=0; a container needs --security-opt seccomp=unconfined. "
            "Without --link the same comparison runs on this machine alone."
        )
    os.environ[_INSIDE] = str(os.getpid())  # `exec` keeps the number of the process
    sys.stdout.flush()
    os.execvp(words[0], [*words, sys.executable, *sys.orig_argv[1:]])


class Link:
    """The link between this process's namespace, node 0, and node 1. `open_link` makes it."""

    def __init__(self, network: int, mounts: int, tcp_defaults: bool) -> None:
        """Name the namespaces of node 1 by open files."""
        mine = f"/proc/{os.getpid()}/fd"
        self._node1 = ("nsenter", f"--net={mine}/{network}", f"--mount={mine}/{mounts}")
        self.tcp_defaults = tcp_defaults

    def command(self, node: int, *words: str) -> list[str]:
        """Return the command that runs `words` on a node."""
        if node == 0:
            return list(words)
        return [*self._node1, "sh", "-c", 'cd "$0" && exec "$@"', os.getcwd(), *words]  # nsenter leaves for the root

    def environment(self, node: int) -> dict[str, str]:
        """Return the variables by which a node's processes find the link."""
        return {"GLOO_SOCKET_IFNAME": INTERFACE, "VLLM_HOST_IP": ADDRESSES[node], "SGLANG_HOST_IP": ADDRESSES[node]}

    def set_rate(self, mbit: float) -> None:
        """Limit what each node sends to `mbit` megabit per second; 0 removes the limit.

        Raises:
            DynaflowError: `tc` failed.
        """
        queue = ("latency", DEFAULT_QUEUE) if self.tcp_defaults else ("limit", str(QUEUE_BYTES))
        for node in range(NODES):
            remove = self.command(node, "tc", "qdisc", "del", "dev", INTERFACE, "root")
            subprocess.run(remove, capture_output=True, check=False)
            if mbit:
                limit = ("rate", f"{mbit}mbit", "burst", f"{BURST_KB}kb", *queue)
                _run(*self.command(node, "tc", "qdisc", "add", "dev", INTERFACE, "root", "tbf", *limit))

    def retransmissions(self) -> int:
        """Return how many TCP segments both nodes have sent again so far."""
        count = 0
        for node in range(NODES):
            found = _run(*self.command(node, "nstat", "--json", "-asz", "TcpRetransSegs"))
            count += json.loads(found)["kernel"]["TcpRetransSegs"]
        return count

    def prepare(self) -> None:
        """Give both nodes their addresses and TCP its settings."""
        for node in range(NODES):
            for words in (
                ("ip", "addr", "add", f"{ADDRESSES[node]}/24", "dev", INTERFACE),
                ("ip", "link", "set", "lo", "up"),
                ("ip", "link", "set", INTERFACE, "gso_max_size", str(SEGMENT_BYTES)),
                ("ip", "link", "set", INTERFACE, "up"),
            ):
                _run(*self.command(node, *words))
            if not self.tcp_defaults:
                setting = "echo 0 > /proc/sys/net/ipv4/tcp_slow_start_after_idle"
                _run(*self.command(node, "sh", "-c", setting))


@contextlib.contextmanager
def open_link(tcp_defaults: bool = False) -> Iterator[Link]:
    """Make node 1 and the link to it, which has no limit yet. This process is on node 0 (`enter`).

    Raises:
        DynaflowError: A command failed; the message names it.
    """
    holder = subprocess.Popen(
        ["unshare", "--net", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /dev/shm && echo && read end"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdin is not None and holder.stdout is not None
    with holder:
        try:
            if not holder.stdout.readline():  # it writes a line when it is in its namespace
                raise DynaflowError("--link: a second node (network and /dev/shm of its own) cannot be made here")
            _run("ip", "link", "add", INTERFACE, "type", "veth", "peer", "name", INTERFACE, "netns", str(holder.pid))
            # Open files keep namespaces.
            opened = [os.open(f"/proc/{holder.pid}/ns/{kind}", os.O_RDONLY) for kind in ("net", "mnt")]
        finally:
            holder.stdin.close()
    try:
        link = Link(opened[0], opened[1], tcp_defaults)
        link.prepare()
        yield link
    finally:
        subprocess.run(["ip", "link", "del", INTERFACE], capture_output=True, check=False)
        for descriptor in opened:
            os.close(descriptor)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        why = done.stderr.strip() or f"exit code {done.returncode}"
        raise DynaflowError(f"the emulated link failed: {' '.join(command)}: {why}")
    return done.stdout
