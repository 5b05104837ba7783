"""Programs and Plans read back from their text form.

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
from dynaflow_serving.core.program import Gradient, Operator, Program, Resource, Scope, Value
from dynaflow_serving.errors import TextError

NumberedLine = tuple[int, str]


def parse_program(text: str) -> Program:
    """The Program in `text`.

    Raises:
        TextError: a line cannot be read; the message has its number.
    """
    (_, head), *lines = _section("program", text)
    reader = _ProgramReader()
    for number, line in lines:
        try:
            reader.read(line)
        except (ValueError, IndexError) as e:
            raise TextError(f"line {number}: cannot read {line!r}: {e}") from None
    _, _, unsplittable = head.partition("unsplittable: ")
    return reader.program(unsplittable)


def parse_plan(text: str) -> Plan:
    """The Plan in `text`.

    Raises:
        TextError: a line cannot be read; the message has its number.
    """
    (number, head), *lines = _section("plan", text)
    if not (m := _PLAN.match(head)):
        raise TextError(f"line {number}: {head!r} is not 'plan NAME program=... micro_batches=... depends=...'")
    actions = []
    for number, line in lines:
        stream, _, action = line.partition("|")
        try:
            actions.append(_read_action(stream.strip(), action.strip()))
        except ValueError as e:
            raise TextError(f"line {number}: cannot read action {line!r}: {e}") from None
    return Plan(m["strategy"], m["program"], int(m["micro_batches"]), _read_depends(m["depends"]), tuple(actions))


def _section(wanted: str, text: str) -> Iterator[NumberedLine]:
    """The lines of the Program or of the Plan in `text`, without comments."""
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


# -- plans ---------------------------------------------------------------------------------------------
_RANGE = r"@(?P<start>\d+)(?::(?P<stop>\d+))?"
_INSTANCE = re.compile(rf"(?P<value>\S+?){_RANGE}$")
_PLAN = re.compile(
    r"plan (?P<strategy>\S+) program=(?P<program>\S+) micro_batches=(?P<micro_batches>\d+) depends=(?P<depends>\S+)$"
)
_RUN = re.compile(rf"run (?P<operator>\S+) {_RANGE}(?: into (?P<into>.+))?$")
_REPLACE = re.compile(rf"replace (?P<operators>.+) {_RANGE} with (?P<kernel>\S+)$")
_SPLIT = re.compile(r"split (?P<whole>\S+) -> (?P<view>\S+)$")
_MERGE = re.compile(r"merge (?P<parts>.+) -> (?P<whole>\S+)$")
_ALLOC_OR_FREE = re.compile(r"(?P<kind>alloc|free) (?P<instances>.+)$")
_EVENT = re.compile(r"(?P<kind>record|wait) e(?P<event>\d+)$")


def _read_depends(text: str) -> tuple[tuple[int, int], ...]:
    """Such as `0>1,1>2`, or `-` for none."""
    if text == "-":
        return ()
    pairs = [pair.split(">") for pair in text.split(",")]
    return tuple((int(earlier), int(later)) for earlier, later in pairs)


def _read_range(m: re.Match[str]) -> tuple[int, int]:
    start = int(m["start"])
    return start, int(m["stop"]) if m["stop"] else start + 1


def _read_instances(text: str) -> tuple[Instance, ...]:
    instances = []
    for word in text.split():
        if not (m := _INSTANCE.match(word)):
            raise ValueError(f"{word!r} is not an instance such as x@0 or x@0:2")
        instances.append(Instance(m["value"], *_read_range(m)))
    return tuple(instances)


def _read_action(stream: str, text: str) -> Action:
    if m := _RUN.match(text):
        into = tuple((m["into"] or "").split())
        return Action(ActionKind.RUN, stream, (m["operator"],), *_read_range(m), into=into)
    if m := _REPLACE.match(text):
        operators = tuple(m["operators"].split(" + "))
        return Action(ActionKind.REPLACE, stream, operators, *_read_range(m), kernel=m["kernel"])
    if m := _SPLIT.match(text):
        return Action(ActionKind.SPLIT, stream, instances=_read_instances(f"{m['whole']} {m['view']}"))
    if m := _MERGE.match(text):
        return Action(ActionKind.MERGE, stream, instances=_read_instances(f"{m['whole']} {m['parts']}"))
    if m := _ALLOC_OR_FREE.match(text):
        return Action(ActionKind(m["kind"]), stream, instances=_read_instances(m["instances"]))
    if m := _EVENT.match(text):
        return Action(ActionKind(m["kind"]), stream, event=int(m["event"]))
    raise ValueError("an action is one of: " + ", ".join(k.value for k in ActionKind))


# -- programs ------------------------------------------------------------------------------------------
class _ProgramReader:
    """Takes the lines of a Program one after the other."""

    def __init__(self) -> None:
        self._values: dict[str, Value] = {}
        self._ports: dict[str, tuple[str, ...]] = {"inputs": (), "outputs": ()}
        self._operators: list[dict[str, Any]] = []  # the arguments of each Operator

    def read(self, line: str) -> None:
        """Raises ValueError or IndexError if `line` cannot be read."""
        word, *rest = line.split()
        if line.startswith(" "):
            self._operators[-1][word] = tuple(rest)
        elif word == "value":
            self._values[rest[0]] = _read_value(*rest)
        elif word == "op":
            self._operators.append(_read_operator(*rest))
        elif word in self._ports:
            self._ports[word] = tuple(rest)
        else:
            raise ValueError(f"unknown field {word!r}")

    def program(self, unsplittable: str) -> Program:
        try:
            operators = tuple(Operator(**arguments) for arguments in self._operators)
        except TypeError as e:
            raise TextError(f"an operator has an unknown field: {e}") from None
        return Program(self._ports["inputs"], self._ports["outputs"], self._values, operators, unsplittable)


def _read_value(*words: str) -> Value:
    """The name, the scope, and the storage if it has another name; `hidden batch:0x2 storage=x`, `loss partial:mean`.

    The scope may say the token axis and the rows per token, or that the value is a mean.
    """
    name, place, *rest = words
    scope, _, shape = place.partition(":")
    mean = shape == "mean"
    axis, _, rows = ("" if mean else shape).partition("x")
    storage = rest[0].removeprefix("storage=") if rest else ""
    return Value(name, Scope(scope), int(axis) if axis else None, int(rows or 1), storage, mean)


def _read_operator(*words: str) -> dict[str, Any]:
    """Such as `layers.0.attention memory group=tp context`; its other fields follow in lines of their own."""
    arguments: dict[str, Any] = {"name": words[0], "resource": Resource(words[1]), "inputs": (), "outputs": ()}
    for flag in words[2:]:
        field, has_value, value = flag.partition("=")
        arguments[field] = value if has_value else True
    if "gradient" in arguments:
        resource, _, group = arguments["gradient"].partition(":")
        arguments["gradient"] = Gradient(Resource(resource), group)
    return arguments
