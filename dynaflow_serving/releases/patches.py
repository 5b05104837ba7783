"""The rows of an integration's `patches.md` against the sources of two releases.

Contract
- The first column names symbols in backticks. `Class.member` is a member, `module.name` or `name` is of a module;
  `.member` continues with the class before it, and `Class.{a, b}` is two.
- A symbol that the tested release does not define under that name (a variable of the environment, an attribute of an
  instance) is told as not checked. The others are equal, changed or gone in the other release.
- Only names and parameters are compared: what they mean may have changed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import permutations
from pathlib import Path

from dynaflow_serving import integrations
from dynaflow_serving.integrations.base import Integration
from dynaflow_serving.releases.sources import Definitions, Signature, Sources, definitions

SYMBOL = re.compile(r"`([^`]+)`")
NAMES = re.compile(r"\.?[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
SEVERAL = re.compile(r"^(.*)\.\{([^}]*)\}$")


class Verdict(StrEnum):
    """What became of a symbol from one release to the other."""

    EQUAL = "equal"
    CHANGED = "changed"
    GONE = "gone"
    UNCHECKED = "not checked"


@dataclass(frozen=True)
class Finding:
    """A symbol of `patches.md` in two releases.

    Attributes:
        symbol: Its name as the row has it, with its class.
        verdict: What became of it.
        differences: What is changed or gone, a line per file.
    """

    symbol: str
    verdict: Verdict
    differences: tuple[str, ...] = ()


def symbols(integration: Integration) -> list[str]:
    """Return the symbols of an integration's `patches.md`, each once, in their order."""
    text = (Path(integrations.__file__).parent / integration.name / "patches.md").read_text()
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("|")]
    return list(dict.fromkeys(symbol for row in rows for symbol in _symbols(row)))


def compare(names: Sequence[str], tested: Sources, other: Sources) -> Iterator[Finding]:
    """Yield what became of each symbol between the tested release and the other one."""
    needed = [_class_of(name) or name.rpartition(".")[2] for name in names]
    found = [definitions(release, needed) for release in (tested, other)]
    yield from _findings(names, *found)


def _findings(names: Sequence[str], tested: Definitions, other: Definitions) -> Iterator[Finding]:
    for name in names:
        before, after = _definitions(tested, name), _definitions(other, name)
        if not before:
            yield Finding(name, Verdict.UNCHECKED)
        elif not after:
            yield Finding(name, Verdict.GONE, tuple(before))
        else:
            lines = (_difference(file, signature, after) for file, signature in before.items())
            changed = tuple(filter(None, lines))
            yield Finding(name, Verdict.CHANGED if changed else Verdict.EQUAL, changed)


def _symbols(row: str) -> Iterator[str]:
    """Yield the symbols of a row, completed and without what follows a call's or an index's bracket."""
    owner = ""
    for written in SYMBOL.findall(row):
        several = SEVERAL.match(written)
        parts = [f"{several[1]}.{part.strip()}" for part in several[2].split(",")] if several else [written]
        for part in parts:
            name = re.split(r"[(\[<]", part)[0].rstrip(".")
            if not NAMES.fullmatch(name):
                continue
            if name.startswith("."):
                name = owner + name
            else:
                owner = name.rpartition(".")[0]
            yield name


def _definitions(release: Definitions, name: str) -> dict[str, Signature]:
    """Return the signatures of a symbol by file."""
    if owner := _class_of(name):
        member = name.partition(f"{owner}.")[2].partition(".")[0]
        if member:
            return release.members(owner, member)
        return {file: d.bases for file, d in release.classes.get(owner, {}).items()}
    *modules, last = name.split(".")
    end = f"/{modules[-1]}.py" if modules else ""
    return {f: signature for f, signature in release.functions.get(last, {}).items() if f"/{f}".endswith(end)}


def _class_of(name: str) -> str:
    """Return the part of a symbol's name that is a class, by its capitals; "" if none is."""
    return next((part for part in name.split(".") if not part.islower() and not part.isupper()), "")


def _difference(file: str, signature: Signature, after: dict[str, Signature]) -> str:
    """Say how a definition differs in the other release; "" if it does not, or has only moved to another file."""
    if file not in after and signature in after.values():
        return ""
    if file not in after:
        return f"{file}: now in {', '.join(after)}, with other parameters"
    removed, added = ([x for x in one if x not in two] for one, two in permutations((signature, after[file])))
    parts = [f"without {', '.join(removed)}"] if removed else []
    parts += [f"with {', '.join(added)}"] if added else []
    return f"{file}: now {'; '.join(parts)}" if parts else ""
