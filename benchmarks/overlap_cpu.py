"""Communication under compute, measured: two processes over a rate-limited link (emulated network, CPU).

    make env ENGINE=transformers
    sudo .nox/transformers/bin/python benchmarks/overlap_cpu.py --rates 200 300 --json overlap.json

A Llama that is made on this machine runs under tensor parallelism of two (transformers, gloo). The variants of its
body's forward pass are
- eager: stock transformers with the un-split batch;
- sequential: N micro-batches one after the other, which wait for every collective in line;
- overlapped: the same micro-batches under the strategy;
- communication and compute alone: the sequential run's collectives, and its operators without the collectives.

overlap efficiency = (sequential - overlapped) / min(compute, communication): 1 where all that can be hidden is hidden.
--training adds forward and backward passes. The forward pass runs in two micro-batches. The backward pass is not split;
its collectives run under compute that does not need them.

Variants take turns, round by round, every second round in reverse. Figures are medians, spreads are least and greatest.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rate_limited_link import INTERFACE, link, unusable
from rich.console import Console
from rich.table import Table

WORLD = 2
RANK_SCRIPT = Path(__file__).with_name("overlap_rank.py")


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", type=numbers, default=[[200.0, 300.0]], help="Mbit/s; 0: no limit")
    parser.add_argument("--micro-batches", nargs="+", type=numbers, default=[[2, 3, 4]], help="each at least 2")
    parser.add_argument("--strategy", default="comm_overlap", help="comm_overlap or nanoflow")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=12, help="sequences")
    parser.add_argument("--sequence", type=int, default=64, help="tokens of each")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--training", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--json", type=Path, help="write the raw figures to this file")
    options = parser.parse_args(arguments)
    options.rates = [rate for group in options.rates for rate in group]
    options.micro_batches = sorted({int(n) for group in options.micro_batches for n in group})
    if min(options.micro_batches, default=0) < 2 or max(options.micro_batches) > options.batch:
        parser.error("--micro-batches must be numbers from 2 to --batch")
    if min(options.rates, default=-1) < 0:
        parser.error("--rates must be megabit per second, 0 for no limit")
    return options


def run_ranks(options: argparse.Namespace, folder: Path, script: Path = RANK_SCRIPT) -> dict[str, Any]:
    """Run `script` on two ranks and return what rank 0 has written to `figures.json`.

    Raises:
        SystemExit: A rank failed; the message is the end of its log.
    """
    settings = {k: v for k, v in vars(options).items() if k != "json"} | {"folder": str(folder)}
    with link() as sides:
        processes = []
        for rank, side in enumerate(sides):
            environment = {
                **os.environ,
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD),
                "MASTER_ADDR": sides[0].address, "MASTER_PORT": "29533", "GLOO_SOCKET_IFNAME": INTERFACE,
                "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
            }  # fmt: skip
            command = side.command(sys.executable, str(script), json.dumps(settings))
            log = (folder / f"rank{rank}.log").open("w")
            shown = None if rank == 0 else log  # rank 0 shows its progress on stderr
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=shown))
        try:
            codes = [p.wait() for p in processes]
        finally:
            for p in processes:
                p.kill()
    for rank, code in enumerate(codes):
        if code:
            text = (folder / f"rank{rank}.log").read_text().strip()[-2000:]
            raise SystemExit(f"{script.name}: rank {rank} ended with exit code {code}\n{text}")
    figures: dict[str, Any] = json.loads((folder / "figures.json").read_text())
    return figures


def show(title: str, rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"{title}; milliseconds, medians (min - max)")
    for head in ("Mbit/s", "N", "eager", "sequential", "overlapped", "network alone", "compute alone", "efficiency",
                 "vs sequential", "vs eager", "equal"):  # fmt: skip
        table.add_column(head, justify="right", no_wrap=True)
    for r in rows:
        table.add_row(
            f"{r['rate_mbit']:g}" if r["rate_mbit"] else "no limit",
            str(r["micro_batches"]),
            *(f"{r[f'{k}_ms']:.0f}" for k in ("eager", "sequential")),
            "{:.0f} ({:.0f} - {:.0f})".format(r["overlapped_ms"], *r["spread_ms"]["overlapped"]),
            *(f"{r[f'{k}_ms']:.0f}" for k in ("communication", "compute")),
            f"{r['overlap_efficiency']:.2f}",
            *("{median:.2f} ({min:.2f} - {max:.2f})".format(**r[f"speedup_over_{k}"]) for k in ("sequential", "eager")),
            r["equal"],
        )
    Console(width=max(190, Console().width)).print(table)


def main() -> None:
    options = parse()
    if reason := unusable():
        print(f"overlap_cpu: a rate-limited link cannot be made here: {reason}.", file=sys.stderr)
        raise SystemExit(2)
    with tempfile.TemporaryDirectory() as folder:
        figures = run_ranks(options, Path(folder))
    what = "2 ranks, gloo, CPU, emulated network"
    show(f"Llama body, forward ({what})", figures["rows"])
    if figures["training"]:
        show(f"Llama body, forward (split in two) and backward (not split) ({what})", figures["training"])
    if options.json:
        about = {
            "command": " ".join(["python", *sys.argv]),
            "what": f"{what}: tc tbf between network namespaces",
            "device": f"CPU {platform.machine()}, {os.cpu_count()} cores for both ranks, 1 thread each",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "settings": {k: v for k, v in vars(options).items() if k != "json"},
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(about | figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
