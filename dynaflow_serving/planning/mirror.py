"""The backward pass of a Plan: its mirror image, as autograd runs it.

Contract
- The operators run backwards: where the forward pass was interleaved, so is the backward pass. Each runs on its own
  stream, or where its gradient is bound by another resource, on that resource's (`backward_stream`).
- The gradient of a call that another stream runs, forward or backward, starts where the forward pass has taken its
  result: right before the next operator of its micro-batch, wherever the call itself was issued.
- Autograd runs the nodes of one thread by descending sequence number, so that is what happens where every operator's
  nodes are made on the caller's thread, or around it there (`capture.eager.gradients`). A test compares the two.
- The result is a Plan of a Program like any other: `verify` proves it, and it draws like any other.
- A value has one gradient per reader. They meet where the value was made, which is where autograd adds them up.
- The gradients of weights are no values: autograd adds them up on the compute stream.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from dynaflow_serving.core.order import in_one_order
from dynaflow_serving.core.plan import Plan
from dynaflow_serving.core.program import PER_MICRO_BATCH, Gradient, Operator, Program, Resource, Value
from dynaflow_serving.planning.lowering import lower
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.strategy.schedule import Launch, Schedule, Task
from dynaflow_serving.strategy.streams import COMPUTE, NETWORK

RESULT = "result"  # it reads the outputs of the forward pass


def backward_of(schedule: Schedule, strategy: str) -> tuple[Program, Plan]:
    """Return the backward pass of a recorded forward pass: its Program and its verified Plan.

    Args:
        schedule: What the strategy recorded, without kernels in place of several operators.
        strategy: Its name.

    Raises:
        PlanError: The mirror image is no correct schedule.
    """
    program = backward_program(schedule.program)
    backward = Schedule(program, schedule.micro_batches)
    for launch in reversed(_as_taken(schedule)):
        tasks = [
            Task(program.by_name[backward_name(name)], micro_batch)
            for name in reversed(launch.operators)
            for micro_batch in range(launch.start, launch.stop)
        ]
        backward.execute(tasks, stream=backward_stream(schedule.program, launch.operators, launch.stream))
    plan = lower(backward, f"{strategy}.backward", zero_copy=False)
    verify(program, plan)
    return program, plan


def _as_taken(schedule: Schedule) -> list[Launch]:
    """Return the launches with each call that crosses streams where its result is taken."""
    order: list[Launch] = []
    held: dict[int, Launch] = {}  # by micro-batch
    for launch in schedule.launches:
        for micro_batch in range(launch.start, launch.stop):
            if micro_batch in held:
                order.append(held.pop(micro_batch))
        backward = backward_stream(schedule.program, launch.operators, launch.stream)
        if launch.stop - launch.start == 1 and (launch.stream, backward) != (COMPUTE, COMPUTE):
            held[launch.start] = launch
        else:
            order.append(launch)
    return [*order, *held.values()]


def backward_stream(program: Program, operators: Sequence[str], stream: str) -> str:
    """Return the stream of the backward pass of operators that `stream` has run."""
    gradients = [g for name in operators if (g := program.by_name[name].gradient)]
    if not gradients:
        return stream
    return NETWORK if any(g.resource is Resource.NETWORK for g in gradients) else COMPUTE


def backward_name(operator: str) -> str:
    """Return what the backward pass of an operator is called."""
    return f"{operator}.backward"


def backward_program(program: Program) -> Program:
    """Return the Program of the backward pass."""
    readers: dict[str, list[str]] = defaultdict(list)
    for op in program.operators:
        for value in dict.fromkeys(op.inputs):
            readers[value].append(op.name)
    for value in program.outputs:
        readers[value].append(RESULT)
    values: dict[str, Value] = {}

    def gradient(value: str, reader: str) -> str:
        """Name the gradient that `reader` gives to `value`."""
        name = f"{value}.grad" if len(readers[value]) == 1 else f"{value}.grad.{reader}"
        forward = program.values[value]
        values[name] = Value(name, forward.scope, forward.axis, forward.rows)
        return name

    def differentiable(names: tuple[str, ...]) -> list[str]:
        return [v for v in dict.fromkeys(names) if program.values[v].scope in PER_MICRO_BATCH]

    operators = []
    for op in reversed(program.operators):
        resource, group = op.gradient or Gradient(op.resource, op.group)
        operators.append(
            Operator(
                backward_name(op.name),
                resource,
                tuple(gradient(v, reader) for v in differentiable(op.outputs) for reader in readers[v]),
                tuple(gradient(v, op.name) for v in differentiable(op.inputs)),
                op.tags,
                group=group,
            )
        )
    backward = Program(
        inputs=tuple(gradient(v, RESULT) for v in differentiable(program.outputs)),
        outputs=tuple(gradient(v, reader) for v in differentiable(program.inputs) for reader in readers[v]),
        values=values,
        operators=tuple(operators),
    )
    return in_one_order(backward, "order")
