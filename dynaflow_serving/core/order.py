"""Which operators must stay in order, for the scheduler and for lowering.

Contract
- `order_edges`: per micro-batch. Dataflow, and program order between an operator that writes a storage
  in place and every operator that touches it (through any alias).
- `state_edges`: between micro-batches. (last writer, toucher) of engine state such as a KV cache; they
  apply to the pairs in `Split.depends` only.
- `external_ports` defines what a group of operators reads and writes, `tracked_values` which values have
  instances, for everybody; the edges are not used by the verifier, which derives what must hold by its own means.
"""

from __future__ import annotations

from collections import defaultdict

from dynaflow_serving.core.program import Operator, Program, Scope


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
    writer: dict[str, str] = {}  # storage -> its last writer so far
    readers: dict[str, list[str]] = defaultdict(list)  # storage -> who touched it since
    for op in program.operators:
        edges = {producer[v] for v in op.inputs if v in producer}
        for storage in touched(program, op):
            if storage in writer:
                edges.add(writer[storage])
            if storage in op.writes:
                edges.update(readers.pop(storage, ()))
                writer[storage] = op.name
            else:
                readers[storage].append(op.name)
        before[op.name] = edges - {op.name}
    return before


def state_edges(program: Program) -> list[tuple[str, str]]:
    """(last writer, toucher) of one engine state; the pair may be one operator that does both. Writers of
    one micro-batch are in order among themselves, so who follows the last follows all."""
    writer = {s: o.name for o in program.operators for s in o.writes if is_state(program, s)}
    return [
        (writer[storage], op.name)
        for op in program.operators
        for storage in sorted(touched(program, op) & writer.keys())
    ]


def tracked_values(program: Program) -> set[str]:
    """The values that a Plan handles per micro-batch: all but sizes, and weights that are inputs."""
    produced = {v for o in program.operators for v in o.outputs}
    return {
        v.name
        for v in program.values.values()
        if v.scope in (Scope.BATCH, Scope.LOCAL) or (v.scope is Scope.SHARED and v.name in produced)
    }


def external_ports(program: Program, names: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Inputs and outputs of a group of operators seen as one: inputs in order of first use, outputs
    (values that anything outside the group reads) in order of production."""
    group = [program.by_name[n] for n in names]
    if len(group) == 1:
        return group[0].inputs, group[0].outputs
    inside = {v for o in group for v in o.outputs}
    wanted = set(program.outputs) | {v for o in program.operators if o.name not in names for v in o.inputs}
    inputs = dict.fromkeys(v for o in group for v in o.inputs if v not in inside)
    return tuple(inputs), tuple(v for o in group for v in o.outputs if v in wanted)
