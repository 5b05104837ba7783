"""Two recordings of one model -> its operators: the borders, and the code between them.

Contract
- Two runs with different numbers of tokens tell the token axis of every tensor (the one dimension that changed in
  proportion), and constants (the same object in both) from what is made each step.
- A border is *plain* if its arguments are tensors and constants and it returns tensors: it runs on any stream, merged,
  or replaced by a kernel. Any other runs for one micro-batch at a time, with its frame's own arguments; so does the
  code between borders (`Operator.context`).
- Where a plain border's results are used by the next border only, and no code runs between, the frame is led on to
  that border with a stand-in for the results, so that the arguments of both are known before either runs: a kernel
  may replace several such borders at once.
- The operators of a micro-batch are totally ordered, by dataflow or by a value `frame.N` where that does not say so.
- A module border's parameters follow its arguments as inputs, for kernels that replace it.
- What cannot be split has its reason in `Program.unsplittable`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from dynaflow_serving.capture.eager.recording import CONSTANTS, BorderCall, Run, Seen, Stretch, tensors_of
from dynaflow_serving.capture.names import operator_name, unique_names, value_name
from dynaflow_serving.core.order import order_edges
from dynaflow_serving.core.program import Operator, Program, Resource, Scope, Value


@dataclass(eq=False, slots=True)
class Part:
    """One operator. If it `moves` its frame, then to the borders `stops`, one after the other; to the end, if none."""

    event: int
    name: str = ""
    plain: bool = False
    moves: bool = False
    stops: list[int] = field(default_factory=list)  # events
    inputs: list[Seen] = field(default_factory=list)
    outputs: list[Seen] = field(default_factory=list)


def pair_up(a: Run, b: Run) -> dict[Seen, Seen] | None:
    """The tensors of `a` with their counterparts in `b`; None if the model took another path."""
    if len(a.events) != len(b.events) or a.inputs.keys() != b.inputs.keys() or a.spec != b.spec:
        return None
    pairs: list[tuple[Any, Any]] = [(a.inputs[i], b.inputs[i]) for i in a.inputs]
    for e, f in zip(a.events, b.events):
        if isinstance(e, BorderCall) and isinstance(f, BorderCall):
            if e.border is not f.border or e.arguments.keys() != f.arguments.keys() or len(e.results) != len(f.results):
                return None
            pairs += [(e.arguments[k], f.arguments[k]) for k in e.arguments]
            pairs += list(zip(e.results, f.results))
    pairs += list(zip(a.outputs, b.outputs))
    twins: dict[Seen, Seen] = {}
    for x, y in pairs:
        if isinstance(x, Seen) != isinstance(y, Seen):
            return None
        if isinstance(x, Seen) and (x.producer != y.producer or twins.setdefault(x, y) is not y):
            return None
    for e, f in zip(a.events, b.events):  # what code reads that crosses no border as an argument
        if isinstance(e, Stretch) and isinstance(f, Stretch) and len(e.reads) == len(f.reads):
            for s, t in zip(e.reads, f.reads):
                if s.producer == t.producer:
                    twins.setdefault(s, t)
    return twins


class ModelProgram:
    """`program`, and its operators' `parts` in the same order; `constants` are the values of its last inputs."""

    def __init__(self, a: Run, b: Run, twins: dict[Seen, Seen], states: Mapping[str, str]) -> None:
        """states: name of a border -> the engine state that it reads and writes, one per module (attention -> "kv")."""
        self.a, self.b, self.twins, self.states = a, b, dict(twins), states
        self.readers: dict[Seen, set[int]] = defaultdict(set)  # events, or their number for the result
        for i, event in enumerate(a.events):
            for s in event.reads if isinstance(event, Stretch) else tensors_of(event.arguments.values()):
                self.readers[s].add(i)
        for s in tensors_of(a.outputs):
            self.readers[s].add(len(a.events))
        self.inputs = {leaf: s for leaf, s in a.inputs.items() if self.axis(s)}
        self.not_plain: set[int] = set()
        self.plain: dict[int, bool] = {}  # borders, by event
        self.stand_for: dict[Seen, Seen] = {}  # tensor that a frame holds -> as what it was handed to the plan
        self.parts = self._make_parts()
        while loose := [q.event for p, q in pairwise(self.parts) if q.plain and not {*p.outputs} & {*q.inputs}]:
            self.not_plain.update(loose)  # nothing but the model's own order says that it comes later
            self.parts = self._make_parts()
        self.constants: dict[str, Any] = {}
        self.value_of: dict[Seen, str] = {}
        self.program = self._make_program()
        for s in (*self.twins, *self.twins.values()):
            s.tensor = None  # of no use any more, and perhaps large

    def border(self, event: int) -> BorderCall:
        found = self.a.events[event]
        assert isinstance(found, BorderCall)
        return found

    # -- tensors ------------------------------------------------------------------------------------
    def axis(self, s: Seen) -> tuple[int, int] | None:
        """(token axis, rows per token)."""
        twin = self.twins.get(s)
        if twin is None or len(s.shape) != len(twin.shape):
            return None
        changed = [d for d, (m, n) in enumerate(zip(s.shape, twin.shape)) if m != n]
        if len(changed) != 1:
            return None
        d = changed[0]
        fits = s.shape[d] * self.b.tokens == twin.shape[d] * self.a.tokens and s.shape[d] % self.a.tokens == 0
        return (d, s.shape[d] // self.a.tokens) if fits else None

    def is_constant(self, s: Seen) -> bool:
        return s.tensor is not None and s in self.twins and s.tensor is self.twins[s].tensor

    # -- operators ----------------------------------------------------------------------------------
    def _is_plain(self, i: int) -> bool:
        event, other = self.border(i), self.b.events[i]
        assert isinstance(other, BorderCall)
        return (
            i not in self.not_plain
            and not event.border.rule.context
            and not event.own_state
            and event.border.name not in self.states
            and any(self.readers[r] for r in tensors_of(event.results))
            and all(isinstance(r, (Seen, *CONSTANTS)) for r in event.results)
            and all(same(v, other.arguments[k]) for k, v in event.arguments.items() if not isinstance(v, Seen))
        )

    def _make_parts(self) -> list[Part]:
        self.plain = {i: self._is_plain(i) for i in range(1, len(self.a.events) - 1, 2)}
        self.stand_for = {}
        skipped = {i + 1 for i in self.plain if self._can_skip(i)}  # stretches that are no operators
        parts: list[Part] = []
        at_hand = set(self.inputs.values())  # what the plan holds; the rest is known to the frame only
        for i, event in enumerate(self.a.events):
            if i in skipped:
                continue
            part = Part(i)
            if isinstance(event, Stretch):
                results = tensors_of(self.border(i - 1).results) if i else []
                before = [r for r in results if self.readers[r]] if i else [*self.inputs.values()]
                reads = [s for s in event.reads if s.producer >= 0 or s in at_hand]
                part.inputs = list(dict.fromkeys((*before, *reads)))
                part.moves = True
            else:
                part.inputs = list(dict.fromkeys(map(self.given, tensors_of(event.arguments.values()))))
                part.outputs = list(dict.fromkeys(tensors_of(event.results)))
                part.plain = self.plain[i]
                part.moves = not part.plain and i + 1 in skipped
            if part.moves:
                self._move(part, i if isinstance(event, Stretch) else i + 1, skipped, at_hand)
            parts.append(part)
        return parts

    def given(self, s: Seen) -> Seen:
        """`s`, as the plan knows it."""
        return self.stand_for.get(s, s)

    def _move(self, part: Part, own: int, skipped: set[int], at_hand: set[Seen]) -> None:
        """Fill in where `part`, running the stretch `own`, leads its frame, and what it hands to the plan there."""
        part.outputs += [
            s
            for s, readers in self.readers.items()
            if s.producer == own and readers - {own} and not self.is_constant(s)
        ]
        part.stops = self._stops(own, skipped)
        wanted = [s for j in part.stops for s in tensors_of(self.border(j).arguments.values())]
        wanted += [] if part.stops else tensors_of(self.a.outputs)
        at_hand |= {s for s in wanted if s.producer == own}
        at_hand |= {r for j in part.stops for r in tensors_of(self.border(j).results)}
        for s in dict.fromkeys(wanted):
            if s in at_hand or s in self.stand_for or self.is_constant(s):
                continue
            self.stand_for[s] = alias = Seen(part.event, s.shape, s.dtype, s.storage)
            if s in self.twins:
                self.twins[alias] = self.twins[s]
            part.outputs.append(alias)
            if s.producer >= 0 and s not in part.inputs:
                part.inputs.append(s)

    def _can_skip(self, i: int) -> bool:
        """Whether the code after border `i` needs no operator: it calls nothing, and its frame goes on with another."""
        after, last = self.a.events[i + 1], len(self.a.events) - 1
        assert isinstance(after, Stretch)
        if after.paths:
            return False
        if not self.plain[i]:
            return True
        if i + 1 == last:
            return all(s.producer % 2 == 1 for s in tensors_of(self.a.outputs))  # results of borders
        fresh = any(
            s.producer == i + 1 and not self.is_constant(s) for s in tensors_of(self.border(i + 2).arguments.values())
        )
        return not fresh and all(self.readers[r] <= {i + 2} for r in tensors_of(self.border(i).results))

    def _stops(self, stretch: int, skipped: set[int]) -> list[int]:
        stops: list[int] = []
        i = stretch + 1
        while i < len(self.a.events):
            stops.append(i)
            if not self.plain[i] or i + 1 not in skipped:
                break
            i += 2
        return stops

    # -- the Program --------------------------------------------------------------------------------
    def _make_program(self) -> Program:
        listed = []
        for part in self.parts:
            event = self.a.events[part.event]
            paths, mark = (event.paths, "") if isinstance(event, Stretch) else ([event.path], event.border.name)
            listed.append(operator_name(paths, mark))
        for part, name in zip(self.parts, unique_names(listed)):
            part.name = name
        values: dict[str, Value] = {}
        storages: dict[int, str] = {}

        def add(s: Seen, name: str) -> None:
            name = name if name not in values else f"{name}.out"
            found = self.axis(s)
            scope, axis, rows = (Scope.BATCH, *found) if found else (Scope.LOCAL, None, 1)
            values[name] = Value(name, scope, axis, rows, storages.setdefault(s.storage, name))
            self.value_of[s] = name

        for leaf, s in self.inputs.items():
            add(s, self.a.names[leaf])
        operators = []
        for part in self.parts:
            for i, s in enumerate(part.outputs):
                add(s, value_name(part.name, i, len(part.outputs)))
            operators.append(self._operator(part, values, storages))
        results = [self.value_of[self.given(s)] for s in tensors_of(self.a.outputs)]
        inputs = tuple(self.value_of[s] for s in self.inputs.values())
        outputs = tuple(dict.fromkeys(results))
        program = Program((*inputs, *self.constants), outputs, values, tuple(operators), self._problem(values, outputs))
        return self._in_order(program)

    def _operator(self, part: Part, values: dict[str, Value], storages: dict[int, str]) -> Operator:
        event = self.a.events[part.event]
        inputs = [self._input(s, values) for s in part.inputs]
        outputs = tuple(self.value_of[s] for s in part.outputs)
        touched = {values[v].storage for v in (*inputs, *outputs)}
        writes = [storages[w] for w in event.writes if storages.get(w) in touched]
        if isinstance(event, Stretch):
            return Operator(part.name, Resource.COMPUTE, tuple(inputs), outputs, writes=tuple(writes), context=True)
        border, rule = event.border, event.border.rule
        if border.module is not None:
            inputs += [self._constant(f"{border.path}.{n}", p, values) for n, p in border.module.named_parameters()]
        if border.name in self.states:
            writes.append(f"{self.states[border.name]}:{event.path}")
        return Operator(
            part.name, rule.resource, tuple(inputs), outputs, rule.tags, tuple(writes), (), rule.group, not part.plain
        )  # fmt: skip

    def _input(self, s: Seen, values: dict[str, Value]) -> str:
        if s not in self.value_of and self.is_constant(s):
            self.value_of[s] = self._constant(f"constant.{len(self.constants)}", s.tensor, values)
        return self.value_of[s]

    def _constant(self, name: str, tensor: Any, values: dict[str, Value]) -> str:
        known = next((n for n, t in self.constants.items() if t is tensor), None)
        if known is not None:
            return known
        self.constants[name] = tensor
        values[name] = Value(name, Scope.SHARED)
        return name

    def _in_order(self, program: Program) -> Program:
        """One operator after the other: frames go through the model's code in its order."""
        operators, values = list(program.operators), dict(program.values)
        edges = order_edges(program)
        for i, (p, q) in enumerate(pairwise(program.operators)):
            if p.name not in edges[q.name]:
                value = f"frame.{i}"
                values[value] = Value(value, Scope.LOCAL)
                operators[i] = replace(operators[i], outputs=(*operators[i].outputs, value))
                operators[i + 1] = replace(operators[i + 1], inputs=(*operators[i + 1].inputs, value))
        return replace(program, operators=tuple(operators), values=values)

    def _problem(self, values: dict[str, Value], outputs: tuple[str, ...]) -> str:
        changing = [self.a.names[leaf] for leaf, s in self.a.inputs.items() if s.shape != self.twins[s].shape]
        if not self.inputs:
            return "no argument of the model has a token axis"
        if strange := [n for n in changing if n not in values]:
            return f"argument {strange[0]} depends on the number of tokens, but has no token axis"
        if local := [v for v in outputs if values[v].scope is not Scope.BATCH]:
            return f"output {local[0]} has no token axis"
        others = [(x, y) for x, y in zip(self.a.outputs, self.b.outputs) if not isinstance(x, Seen)]
        if any(not same(x, y) for x, y in others):
            return "the model returns an object that is made anew in each call"
        return self.a.problem or self.b.problem


def same(value: Any, other: Any) -> bool:
    """Whether two runs have passed the same: equal numbers and words, or one and the same object."""
    return value is other or (isinstance(value, CONSTANTS) and type(value) is type(other) and bool(value == other))
