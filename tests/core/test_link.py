"""The two emulated nodes: what is on them, what the link lets through, and that nothing is left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from links import why_no_link

from dynaflow_serving.bench.link import check_rates
from dynaflow_serving.errors import ConfigError

SCRIPT = """
import json, os, socket, subprocess, sys, time
from dynaflow_serving.bench.link import ADDRESSES, INTERFACE, enter, open_link

RECEIVE = '''
import socket, sys
server = socket.create_server((sys.argv[1], 5000))
print(flush=True)
connection, _ = server.accept()
while connection.recv(1 << 20):
    pass
'''

def on(link, node, *words):
    return subprocess.run(link.command(node, *words), capture_output=True, text=True, check=True).stdout.strip()

enter()
found = {"pid": os.getpid(), "user": os.getuid()}
with open_link(tcp_defaults="defaults" in sys.argv) as link:
    link.set_rate(80)
    setting = "/proc/sys/net/ipv4/tcp_slow_start_after_idle"
    found["slow start"] = [on(link, node, "cat", setting) for node in (0, 1)]
    found["queues"] = [on(link, node, "tc", "qdisc", "show", "dev", INTERFACE) for node in (0, 1)]
    found["folders"] = [on(link, node, "pwd") for node in (0, 1)]
    found["memory"] = [on(link, node, "stat", "-f", "-c", "%i", "/dev/shm") for node in (0, 1)]
    receiver = subprocess.Popen(link.command(1, sys.executable, "-c", RECEIVE, ADDRESSES[1]), stdout=subprocess.PIPE)
    receiver.stdout.readline()
    began = time.perf_counter()
    with socket.create_connection((ADDRESSES[1], 5000)) as connection:
        connection.sendall(bytes(3_000_000))
    receiver.wait()
    found["seconds"] = time.perf_counter() - began
    found["retransmissions"] = link.retransmissions()
    link.set_rate(0)
    found["without"] = on(link, 0, "tc", "qdisc", "show", "dev", INTERFACE)
print(json.dumps(found))
"""

linked = pytest.mark.skipif(bool(why_no_link()), reason=why_no_link())


def run(*arguments: str) -> dict[str, Any]:
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    found: dict[str, Any] = json.loads(stdout)
    assert found["pid"] == process.pid and found["user"] == 0  # the same process, as root of its own namespace
    return found


@linked
def test_an_honest_link() -> None:
    before = Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle").read_text()
    found = run()
    assert found["slow start"] == ["0", "0"]
    assert all("tbf" in queue and "rate 80Mbit" in queue for queue in found["queues"])
    assert 0.25 < found["seconds"] < 3  # 3 MB at 80 Mbit/s are 0.3 s
    assert found["retransmissions"] >= 0 and "tbf" not in found["without"]
    assert found["folders"] == [str(Path.cwd())] * 2
    assert len(set(found["memory"])) == 2  # shared memory of its own, as on another machine
    assert Path("/proc/sys/net/ipv4/tcp_slow_start_after_idle").read_text() == before


@linked
def test_tcp_as_the_kernel_has_it() -> None:
    found = run("defaults")
    assert found["slow start"] == ["1", "1"]
    assert all("lat 100ms" in queue for queue in found["queues"])


@pytest.mark.parametrize("rate", [-5.0, 0.5, 1e6, float("nan")])
def test_a_wrong_rate(rate: float) -> None:
    check_rates([300.0, 0.0])
    with pytest.raises(ConfigError, match="megabit per second from 1 to 40000"):
        check_rates([300.0, rate])
