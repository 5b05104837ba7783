"""The text form of Programs and Plans, read back.

Contract
- `parse_program(x.to_text()) == x`, `parse_plan` likewise, and the text of what was read is the text again.
- `#` starts a comment line. A file may hold a Program, then its Plan; each function skips the other one's lines.
- An unreadable line raises `TextError` with its number.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from dynaflow_serving.core.plan import Action, ActionKind, Instance, Plan
from dynaflow_serving.core.program import Operator, Program, Resource, Scope, Value
from dynaflow_serving.errors import TextError


def parse_program(text: str) -> Program:
    """Raises `TextError` with the number of the line."""
    return _read_program(list(_section("program", text)))


def parse_plan(text: str) -> Plan:
    """Raises `TextError` with the number of the line."""
    return _read_plan(list(_section("plan", text)))


def _section(wanted: str, text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of the Program or of the Plan in `text`."""
    section, found = "", False
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        word, *rest = line.split()
        if word in ("program", "plan") and rest[:1] != ["|"]:  # a stream may have such a name
            section = word
        if section == wanted:
            found = True
            yield number, line
    if not found:
        raise TextError(f"no {wanted} found: its text starts with a line '{wanted} ...'")


_RANGE = r"@(\d+)(?::(\d+))?"
_INSTANCE = re.compile(rf"(\S+?){_RANGE}$")
_PLAN = re.compile(r"plan (\S+) program=(\S+) micro_batches=(\d+) depends=(\S+)$")
_RUN = re.compile(rf"run (\S+) {_RANGE}(?: into (.+))?$")
_REPLACE = re.compile(rf"replace (.+) {_RANGE} with (\S+)$")
_SPLIT_MERGE = re.compile(r"(split|merge) (.+) -> (\S+)$")
_LIST = re.compile(r"(alloc|free) (.+)$")
_EVENT = re.compile(r"(record|wait) e(\d+)$")


def _range(start: str, stop: str | None) -> tuple[int, int]:
    return int(start), int(stop) if stop else int(start) + 1


def _instance(text: str) -> Instance:
    if not (m := _INSTANCE.match(text)):
        raise ValueError(f"{text!r} is not an instance such as x@0 or x@0:2")
    return Instance(m[1], *_range(m[2], m[3]))


def _action(stream: str, text: str) -> Action:
    if m := _RUN.match(text):
        start, stop = _range(m[2], m[3])
        return Action(ActionKind.RUN, stream, (m[1],), start, stop, into=tuple((m[4] or "").split()))
    if m := _REPLACE.match(text):
        start, stop = _range(m[2], m[3])
        return Action(ActionKind.REPLACE, stream, tuple(m[1].split(" + ")), start, stop, kernel=m[4])
    if m := _SPLIT_MERGE.match(text):
        left, right = tuple(map(_instance, m[2].split())), _instance(m[3])
        ordered = (*left, right) if m[1] == "split" else (right, *left)
        return Action(ActionKind(m[1]), stream, instances=ordered)
    if m := _LIST.match(text):
        return Action(ActionKind(m[1]), stream, instances=tuple(map(_instance, m[2].split())))
    if m := _EVENT.match(text):
        return Action(ActionKind(m[1]), stream, event=int(m[2]))
    raise ValueError("an action is one of: " + ", ".join(k.value for k in ActionKind))


def _read_plan(lines: list[tuple[int, str]]) -> Plan:
    number, head = lines[0]
    if not (m := _PLAN.match(head)):
        raise TextError(f"line {number}: {head!r} is not 'plan NAME program=... micro_batches=... depends=...'")
    depends = tuple(tuple(map(int, d.split(">"))) for d in m[4].split(",")) if m[4] != "-" else ()
    actions = []
    for number, line in lines[1:]:
        stream, _, text = line.partition("|")
        try:
            actions.append(_action(stream.strip(), text.strip()))
        except ValueError as e:
            raise TextError(f"line {number}: cannot read action {line!r}: {e}") from None
    return Plan(m[1], m[2], int(m[3]), depends, tuple(actions))  # type: ignore[arg-type]


def _read_program(lines: list[tuple[int, str]]) -> Program:
    values: dict[str, Value] = {}
    ports: dict[str, tuple[str, ...]] = {"inputs": (), "outputs": ()}
    operators: list[dict[str, Any]] = []
    _, _, unsplittable = lines[0][1].partition("unsplittable: ")
    for number, line in lines[1:]:
        word, *rest = line.split()
        try:
            if line.startswith(" "):
                operators[-1][word] = tuple(rest)
            elif word == "value":
                scope, _, place = rest[1].partition(":")
                axis, _, rows = place.partition("x")
                storage = rest[2].removeprefix("storage=") if len(rest) > 2 else ""
                values[rest[0]] = Value(rest[0], Scope(scope), int(axis) if axis else None, int(rows or 1), storage)
            elif word == "op":
                flags = {f.partition("=")[0]: f.partition("=")[2] or True for f in rest[2:]}
                operators.append({"name": rest[0], "resource": Resource(rest[1]), "inputs": (), "outputs": (), **flags})
            elif word in ports:
                ports[word] = tuple(rest)
            else:
                raise ValueError(f"unknown field {word!r}")
        except (ValueError, IndexError) as e:
            raise TextError(f"line {number}: cannot read {line!r}: {e}") from None
    try:
        built = tuple(Operator(**o) for o in operators)
    except TypeError as e:
        raise TextError(f"an operator has an unknown field: {e}") from None
    return Program(ports["inputs"], ports["outputs"], values, built, unsplittable)
