"""Never slower: the decisions of `strategy: auto`, and their effect on full runs, in three systems.

    make never-slower        # makes the environments, then runs this with each

- vllm, sglang: the engine runs against itself under `strategy: auto`, on this machine. It is a CPU, where a split has
  nothing to win. The strategy must decline, and the ratio to the stock engine must be 1.00 within the noise, which is
  printed.
- transformers: two ranks run over a rate-limited link (emulated network; it needs root and iproute2). Stock, every
  candidate as a fixed strategy, and auto take turns. Where the link is slow, auto must adopt an overlap and keep at
  least 95 % of the best fixed strategy's gain. The best one is that of every second round, and the figures are of the
  other rounds. Without a limit auto must decline.

The exit code is 1 if one of these does not hold.
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

from rich.console import Console
from rich.table import Table

from dynaflow_serving.core.measurement import Spread

BENCHMARKS = Path(__file__).parent
KEPT = 0.95  # of the best fixed strategy's gain
ENGINES = ("vllm", "sglang")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", nargs="+", choices=(*ENGINES, "transformers"))
    parser.add_argument("--rates", nargs="+", type=float, default=[200.0, 0.0], help="Mbit/s; 0: no limit")
    parser.add_argument("--rounds", type=int, default=24, help="transformers: rounds in turn, at least 2")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=12, help="sequences")
    parser.add_argument("--sequence", type=int, default=64, help="tokens of each")
    parser.add_argument("--pairs", type=int, default=5, help="engines: pairs of passes per start")
    parser.add_argument("--starts", type=int, default=5, help="engines: how often both are started")
    parser.add_argument("--folder", type=Path, help="write the raw figures into this folder")
    return parser.parse_args()


def engine(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run `dynaflow bench` several times and return its figures.

    Two processes of one engine may differ by some percent for as long as they live, which no number of pairs would
    show. The first start tunes, the others read its table.
    """
    starts = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.starts):
            file = Path(folder, f"figures{number}.json")
            command = [str(Path(sys.executable).with_name("dynaflow")), "bench", name, "--strategy", "auto"]
            command += ["-o", f"table={folder}/table.json", "--pairs", str(options.pairs), "--json", str(file)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if not file.exists():
                what = f"{' '.join(command)} ended with exit code {done.returncode}"
                raise SystemExit(f"never_slower: {what}\n{done.stdout}")
            starts.append(json.loads(file.read_text()))
        policy = json.loads(Path(folder, "table.json").read_text())
    return {
        "ratio": Spread.of_ratios(s["ratio"]["median"] for s in starts).as_dict(),
        "tokens_equal": all(s["tokens_equal"] for s in starts),
        "starts": starts,
        "policy": policy,
    }


def judge_engine(figures: dict[str, Any]) -> list[str]:
    ratio, wrong = figures["ratio"], []
    if not figures["tokens_equal"]:
        wrong.append("tokens differ")
    if not ratio["min"] <= 1.0 <= ratio["max"] and not 0.98 <= ratio["median"] <= 1.02:
        wrong.append(f"ratio {ratio['median']:.3f} ({ratio['min']:.3f} - {ratio['max']:.3f}) is not 1.00 within noise")
    return wrong


def transformers(options: argparse.Namespace) -> dict[str, Any]:
    from overlap_cpu import run_ranks

    with tempfile.TemporaryDirectory() as folder:
        settings = argparse.Namespace(
            rates=options.rates, rounds=options.rounds, layers=options.layers, hidden=options.hidden,
            batch=options.batch, sequence=options.sequence,
        )  # fmt: skip
        return run_ranks(settings, Path(folder), BENCHMARKS / "never_slower_rank.py")


def judge_transformers(figures: dict[str, Any]) -> list[str]:
    wrong = []
    for row in figures["rows"]:
        where = f"{row['rate_mbit']:g} Mbit/s" if row["rate_mbit"] else "no limit"
        if row["equal"] != "bit for bit":
            wrong.append(f"{where}: hidden states differ")
        if row["rate_mbit"] and not row["adopted"]:
            wrong.append(f"{where}: declined")
        if row["rate_mbit"] and row["kept"] < KEPT:
            wrong.append(f"{where}: keeps {row['kept']:.0%} of the gain of {row['best']}")
        if not row["rate_mbit"] and row["adopted"]:
            wrong.append(f"{where}: adopted {row['adopted']}")
    return wrong


def show_engine(name: str, figures: dict[str, Any]) -> Table:
    first, ratio = figures["starts"][0], figures["ratio"]
    title = (
        f"{name} {first['engine_version']} on {first['device']}, strategy auto: ratio to stock {ratio['median']:.3f} "
        f"({ratio['min']:.3f} - {ratio['max']:.3f} of {len(figures['starts'])} starts)"
    )
    table = Table(title=title, title_justify="left")
    for head in ("start", "ratio, median of pairs", "min - max", "tokens equal", "steps split", "un-split"):
        table.add_column(head)
    for number, start in enumerate(figures["starts"], 1):
        unsplit = "\n".join(f"{count}: {why}" for why, count in start["steps"]["unsplit"].items())
        spread = "{min:.3f} - {max:.3f}".format(**start["ratio"])
        equal = "yes" if start["tokens_equal"] else "NO"
        median = f"{start['ratio']['median']:.3f}"
        table.add_row(str(number), median, spread, equal, str(start["steps"]["split"]), unsplit)
    return table


def show_transformers(figures: dict[str, Any]) -> Table:
    table = Table(
        title="Llama body, 2 ranks, gloo, CPU, emulated network; speed-up over stock, median (min - max)",
        title_justify="left",
    )
    for head in ("Mbit/s", "schedule", "ms", "speed-up", ""):
        table.add_column(head, justify="left" if head in ("schedule", "") else "right")
    for row in figures["rows"]:
        for name, ms in row["ms"].items():
            note = ""
            if name == "auto":
                note = f"adopted {row['adopted']}" if row["adopted"] else f"declined: {row['reason']}"
                note += f"; keeps {row['kept']:.0%} of the gain of {row['best']}" if row["adopted"] else ""
            rate = f"{row['rate_mbit']:g}" if row["rate_mbit"] else "no limit"
            speed = "" if name == "stock" else "{median:.3f} ({min:.3f} - {max:.3f})".format(**row["speed_up"][name])
            table.add_row(rate, name, f"{ms:.0f}", speed, note)
        table.add_section()
    return table


def main() -> None:
    options, out, wrong = parse(), Console(width=max(140, Console().width)), []
    for system in options.system:
        if system == "transformers":
            from rate_limited_link import unusable

            if reason := unusable():
                raise SystemExit(f"never_slower: a rate-limited link cannot be made here: {reason}.")
            figures = transformers(options)
            out.print(show_transformers(figures))
            found = judge_transformers(figures)
        else:
            figures = engine(system, options)
            out.print(show_engine(system, figures))
            found = judge_engine(figures)
        wrong += [f"{system}: {what}" for what in found]
        if options.folder:
            about = {"command": " ".join(sys.argv), "device": f"CPU {platform.machine()}, {os.cpu_count()} cores"}
            options.folder.mkdir(parents=True, exist_ok=True)
            file = options.folder / f"never_slower_{system}.json"
            file.write_text(json.dumps({**about, **figures}, indent=1) + "\n")
    for what in wrong:
        out.print(f"never_slower: FAILED: {what}", style="red", markup=False)
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
