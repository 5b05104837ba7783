"""Recorded launches -> Plan: views, merges, buffers, waits and lifetimes are inserted here.

Contract
- Whatever a strategy recorded, the lowered Plan has no race: when a value, an in-place write, an engine
  state or a collective order crosses streams, an event does too.
- Waits are minimal: none is inserted for what earlier waits already order (vector clocks per stream).
- Micro-batch inputs are views. A merge whose parts were produced by operators that can write into a
  given buffer gets that buffer first (ALLOC) and copies nothing.
- A value used by one stream only is freed after its last reader; one that crosses streams at the join.
- A value that is a sum over tokens (PARTIAL) is merged by addition, is never cut, and has no buffer.
- A merge copies, so an in-place write reaches the copy or the parts, never both. What it does not reach
  is *stale*: reading it later is a `ScheduleError`.

The work has two parts, which share the list of nodes (actions without events):
- `dataflow` decides which instance holds what, and adds views, merges and buffers (`copies`: stale contents);
- `ordering` decides what follows what, and adds frees and events.
"""

from __future__ import annotations

from dynaflow_serving.core.order import external_ports
from dynaflow_serving.core.plan import COMPUTE_STREAM, ActionKind, Plan
from dynaflow_serving.core.program import Program
from dynaflow_serving.planning.dataflow import Dataflow
from dynaflow_serving.planning.nodes import Node, NodeList
from dynaflow_serving.planning.ordering import OperatorOrder, place_events, place_frees
from dynaflow_serving.strategy.schedule import Launch, Schedule


def lower(schedule: Schedule, strategy: str, zero_copy: bool = True) -> Plan:
    """The Plan of a finished recording.

    Args:
        schedule: what the strategy recorded.
        strategy: its name.
        zero_copy: whether operators may write into given buffers (autograd has no `out=`).

    Raises:
        ScheduleError: the launches need a value cut or merged that cannot be, or read stale contents.
    """
    program, nodes = schedule.program, NodeList()
    dataflow = Dataflow(program, schedule.micro_batches, nodes, zero_copy)
    order = OperatorOrder(program, schedule.depends)
    for launch in schedule.launches:
        _add_launch(program, launch, nodes, dataflow, order)
    _join(nodes, dataflow)
    actions = place_events(nodes.in_issue_order(), nodes.entry)
    return Plan(strategy, program.digest, schedule.micro_batches, schedule.depends, tuple(actions))


def _add_launch(program: Program, launch: Launch, nodes: NodeList, dataflow: Dataflow, order: OperatorOrder) -> None:
    kind = ActionKind.REPLACE if launch.kernel else ActionKind.RUN
    node = Node(
        kind,
        launch.stream,
        operators=launch.operators,
        start=launch.start,
        stop=launch.stop,
        kernel=launch.kernel,
    )
    ops = [program.by_name[name] for name in launch.operators]
    inputs, outputs = external_ports(program, launch.operators)
    instances = [dataflow.read(v, launch.start, launch.stop, node) for v in inputs if v in dataflow.tracked]
    order.add(node, ops)
    nodes.append(node)
    dataflow.write_and_produce(node, ops, instances, [v for v in outputs if v in dataflow.tracked])


def _join(nodes: NodeList, dataflow: Dataflow) -> None:
    """Bring the outputs together on the compute stream, join the streams, and free the rest there."""
    join = Node(ActionKind.FREE, COMPUTE_STREAM)
    outputs = dataflow.read_outputs(join)
    join.after |= nodes.last_of_each_stream()
    nodes.append(join)
    place_frees(dataflow.users_of_temporaries(outputs), join)
