"""The README's commands and lines of Python, for tests that run them as a reader does, with tiny models.

A command's placeholders (MODEL, ARGS, ...) are replaced by the test; a word that is in no command is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dynaflow_serving.bench.serving.server import Server, free_port

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def line_with(part: str) -> str:
    """Return the one line of Python that has `part`, without its comment."""
    (line,) = [line for block in blocks("python") for line in block.splitlines() if part in line]
    return line.partition("  #")[0]


def command(part: str, **placeholders: str) -> list[str]:
    """Return the words of the one command that has `part`; each placeholder stands for the words of its value."""
    lines = [line.removeprefix("$ ") for block in blocks("console") for line in block.splitlines() if line[:2] == "$ "]
    (line,) = [line.partition("  #")[0] for line in lines if part in line]
    words = line.split()
    for name, value in placeholders.items():
        place = words.index(name)
        words[place : place + 1] = value.split()
    return words


@contextmanager
def serving(words: list[str], environment: Mapping[str, str], log: Path) -> Iterator[Server]:
    """Run a server by its command, on a free port, until the block ends; in the block it is healthy."""
    port = free_port()
    server = Server("of the README", [*words, "--port", str(port)], port, environment, log)
    try:
        server.wait(500)
        yield server
    finally:
        server.stop()
