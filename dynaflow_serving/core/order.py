"""Which operators must stay in order, for the scheduler and for lowering.

Contract
- `order_edges` hold within each micro-batch: dataflow, and program order between an operator that writes a storage
  in place and every operator that touches it (through any alias).
- `state_edges` hold between micro-batches, for the pairs in `Split.depends` only: an operator that touches an engine
  state, such as a KV cache, comes after the last one that writes it.
- `external_ports` defines what a group of operators reads and writes, `tracked_values` which values have instances,
  for everybody. The verifier does not use the edges: it derives by its own means what must hold.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

from dynaflow_serving.core.program import PER_MICRO_BATCH, Operator, Program, Scope, Value


def touched(program: Program, op: Operator) -> set[str]:
    """Storages and engine states that `op` reads or writes."""
    return {program.values[v].storage for v in op.inputs} | set(op.reads) | set(op.writes)


def is_state(program: Program, storage: str) -> bool:
    """Whether all micro-batches see one `storage` (a KV cache), rather than each a slice of it."""
    value = program.values.get(storage)
    return value is None or value.scope is Scope.SHARED


def order_edges(program: Program) -> dict[str, set[str]]:
    """Operator -> operators that must come before it within one micro-batch."""
    producer = {v: o.name for o in program.operators for v in o.outputs}
    before: dict[str, set[str]] = {}
    last_writer: dict[str, str] = {}  # by storage
    touched_since: dict[str, list[str]] = defaultdict(list)  # storage -> the operators after its last writer
    for op in program.operators:
        edges = {producer[v] for v in op.inputs if v in producer}
        for storage in touched(program, op):
            if storage in last_writer:
                edges.add(last_writer[storage])
            if storage in op.writes:
                edges.update(touched_since.pop(storage, ()))
                last_writer[storage] = op.name
            else:
                touched_since[storage].append(op.name)
        before[op.name] = edges - {op.name}
    return before


def in_one_order(program: Program, name: str) -> Program:
    """Put a value `name.N` between neighbours that no dataflow orders, so that program order is the only order.

    So are the operators of a suspended computation, and its gradients.
    """
    operators, values = list(program.operators), dict(program.values)
    edges = order_edges(program)
    for i, (earlier, later) in enumerate(pairwise(program.operators)):
        if earlier.name not in edges[later.name]:
            value = f"{name}.{i}"
            values[value] = Value(value, Scope.LOCAL)
            operators[i] = replace(operators[i], outputs=(*operators[i].outputs, value))
            operators[i + 1] = replace(operators[i + 1], inputs=(*operators[i + 1].inputs, value))
    return replace(program, operators=tuple(operators), values=values)


def state_edges(program: Program) -> list[tuple[str, str]]:
    """Pairs (last writer, toucher) of operators that share an engine state; one operator may be both.

    The writers of one micro-batch are in order among themselves, so that who follows the last one follows all.
    """
    last_writer = {s: o.name for o in program.operators for s in o.writes if is_state(program, s)}
    return [
        (last_writer[storage], op.name)
        for op in program.operators
        for storage in sorted(touched(program, op) & last_writer.keys())
    ]


def tracked_values(program: Program) -> set[str]:
    """The values that a Plan handles per micro-batch: all but numbers of tokens, and weights that are inputs."""
    produced = {v for o in program.operators for v in o.outputs}
    return {
        v.name
        for v in program.values.values()
        if v.scope in PER_MICRO_BATCH or (v.scope is Scope.SHARED and v.name in produced)
    }


def external_ports(program: Program, names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The inputs and outputs of a group of operators seen as one.

    Returns:
        The inputs in order of first use, and the outputs (the values that something outside the group reads) in order
        of production. A single operator has its own inputs and outputs.
    """
    group = [program.by_name[n] for n in names]
    if len(group) == 1:
        return group[0].inputs, group[0].outputs
    inside = {v for o in group for v in o.outputs}
    wanted = set(program.outputs) | {v for o in program.operators if o.name not in names for v in o.inputs}
    inputs = dict.fromkeys(v for o in group for v in o.inputs if v not in inside)
    return tuple(inputs), tuple(v for o in group for v in o.outputs if v in wanted)
