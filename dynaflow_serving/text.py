"""The text form of Programs and Plans.

Contract
- `parse(type, dump(x)) == x`, and `dump(parse(type, t)) == t` for every text that `dump` wrote.
- One line a step or a field; `#` starts a comment line; a file may hold a Program, then its Plan.
- An unreadable line raises `TextError` with its number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from dynaflow_serving.errors import TextError
from dynaflow_serving.ir import Instance, Operator, Plan, Program, Resource, Scope, Step, StepKind, Value

T = TypeVar("T")


def dump(obj: object) -> str:
    lines = _program_lines(obj) if isinstance(obj, Program) else _plan_lines(obj)  # type: ignore[arg-type]
    return "\n".join(lines) + "\n"


def parse(cls: type[T], source: str) -> T:
    """The `cls` (Program or Plan) in `source`; lines of the other kind are skipped."""
    section, wanted = "", "program" if issubclass(cls, Program) else "plan"
    lines: list[tuple[int, str]] = []
    for number, line in enumerate(source.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        word, *rest = line.split()
        if word in ("program", "plan") and rest[:1] != ["|"]:  # a stream may have such a name
            section = word
        if section == wanted:
            lines.append((number, line))
    if not lines:
        raise TextError(f"no {wanted} found: its text starts with a line '{wanted} ...'")
    reader: Callable[[list[tuple[int, str]]], Any] = _read_program if wanted == "program" else _read_plan
    result: T = reader(lines)
    return result


def range_text(start: int, stop: int) -> str:
    return f"@{start}" if stop == start + 1 else f"@{start}:{stop}"


def instance_text(i: Instance) -> str:
    return i.value + range_text(i.start, i.stop)


def step_text(s: Step) -> str:
    """A step without its stream: `run layers.0.attention @0`."""
    names = [instance_text(i) for i in s.instances]
    match s.kind:
        case StepKind.RUN:
            into = f" into {' '.join(s.into)}" if s.into else ""
            return f"run {s.operators[0]} {range_text(s.start, s.stop)}{into}"
        case StepKind.REPLACE:
            return f"replace {' + '.join(s.operators)} {range_text(s.start, s.stop)} with {s.kernel}"
        case StepKind.SPLIT:
            return f"split {names[0]} -> {names[1]}"
        case StepKind.MERGE:
            return f"merge {' '.join(names[1:])} -> {names[0]}"
        case StepKind.ALLOC | StepKind.FREE:
            return f"{s.kind.value} {' '.join(names)}"
    return f"{s.kind.value} e{s.event}"


def _plan_lines(p: Plan) -> Iterator[str]:
    depends = ",".join(f"{a}>{b}" for a, b in p.depends)
    yield f"plan {p.strategy} program={p.program} micro_batches={p.micro_batches} depends={depends or '-'}"
    width = max(len(s) for s in p.streams)
    for step in p.steps:
        yield f"{step.stream:<{width}} | {step_text(step)}"


def _program_lines(p: Program) -> Iterator[str]:
    yield "program" + (f" unsplittable: {p.unsplittable}" if p.unsplittable else "")
    for v in p.values.values():
        where = f"batch:{v.axis}" if v.scope is Scope.BATCH else v.scope.value
        where += f"{'' if v.axis is not None else ':'}x{v.rows}" if v.rows > 1 else ""
        alias = f" storage={v.storage}" if v.storage != v.name else ""
        yield f"value {v.name} {where}{alias}"
    yield f"inputs {' '.join(p.inputs)}"
    for o in p.operators:
        flags = f" group={o.group}" * bool(o.group) + " context" * o.context
        yield f"op {o.name} {o.resource.value}{flags}"
        for field in ("tags", "inputs", "outputs", "writes", "reads", "into"):
            if names := getattr(o, field):
                yield f"  {field} {' '.join(names)}"
    yield f"outputs {' '.join(p.outputs)}"


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


def _step(stream: str, text: str) -> Step:
    if m := _RUN.match(text):
        start, stop = _range(m[2], m[3])
        return Step(StepKind.RUN, stream, (m[1],), start, stop, into=tuple((m[4] or "").split()))
    if m := _REPLACE.match(text):
        start, stop = _range(m[2], m[3])
        return Step(StepKind.REPLACE, stream, tuple(m[1].split(" + ")), start, stop, kernel=m[4])
    if m := _SPLIT_MERGE.match(text):
        left, right = tuple(map(_instance, m[2].split())), _instance(m[3])
        ordered = (*left, right) if m[1] == "split" else (right, *left)
        return Step(StepKind(m[1]), stream, instances=ordered)
    if m := _LIST.match(text):
        return Step(StepKind(m[1]), stream, instances=tuple(map(_instance, m[2].split())))
    if m := _EVENT.match(text):
        return Step(StepKind(m[1]), stream, event=int(m[2]))
    raise ValueError("a step is one of: " + ", ".join(k.value for k in StepKind))


def _read_plan(lines: list[tuple[int, str]]) -> Plan:
    number, head = lines[0]
    if not (m := _PLAN.match(head)):
        raise TextError(f"line {number}: {head!r} is not 'plan NAME program=... micro_batches=... depends=...'")
    depends = tuple(tuple(map(int, d.split(">"))) for d in m[4].split(",")) if m[4] != "-" else ()
    steps = []
    for number, line in lines[1:]:
        stream, _, text = line.partition("|")
        try:
            steps.append(_step(stream.strip(), text.strip()))
        except ValueError as e:
            raise TextError(f"line {number}: cannot read step {line!r}: {e}") from None
    return Plan(m[1], m[2], int(m[3]), depends, tuple(steps))  # type: ignore[arg-type]


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
