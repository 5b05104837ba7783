"""TokenWeave (arXiv 2505.11329; DynaFlow paper, section 6).

All-reduce, residual add and norm run as one operator on shards of the tokens. It is on the network stream, beside the
compute of the other half of the tokens:

    compute  c0@0  c0@1            c1@0            c1@1
    network        rs norm ag @0   rs norm ag @1

The step is cut into two at a multiple of the GEMM tile, near the middle, where the halves together run the fewest
waves of tiles: a careless cut adds a wave, which costs more than the overlap gains.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from pydantic import Field
from torch import fx

from dynaflow_serving.capture.fx.symbols import fake_value
from dynaflow_serving.core.batch import Batch, Split
from dynaflow_serving.core.program import Operator, Program, Resource, Scope
from dynaflow_serving.errors import ScheduleError
from dynaflow_serving.kernels.shard_tokens import ShardTokens
from dynaflow_serving.strategy.base import OpScheduler, Options
from dynaflow_serving.strategy.registry import register_strategy
from dynaflow_serving.strategy.rules import CALLS, GraphRule, function_names
from dynaflow_serving.strategy.schedule import Schedule, Task
from dynaflow_serving.strategy.splitting import cut_at_tokens, whole
from dynaflow_serving.strategy.tags import Tag, TagUse

SHARD_TOKENS = ShardTokens()
_TOKEN_WISE = {  # what residual adds and norms are made of; they keep equal ranks equal
    "add", "sub", "mul", "div", "truediv", "pow", "square", "mean", "var", "sqrt", "rsqrt", "neg", "to", "float",
    "type", "type_as", "_to_copy", "rms_norm", "layer_norm",
}  # fmt: skip


class AfterAllReduce(GraphRule):
    """Matches what follows an all-reduce with nothing beside residuals and one-dimensional weights: add and norm."""

    def find(self, graph: fx.Graph) -> dict[str, str]:
        return _tails(graph, self.target)

    def candidates(self, node: fx.Node) -> str | None:
        return max(function_names(node), key=len, default=None)


def _tails(graph: fx.Graph, collective: str) -> dict[str, str]:
    """Map each node to the newest all-reduce that it follows token by token."""
    follows: dict[fx.Node, tuple[int, str]] = {}  # also the collectives and their waits
    tails: dict[str, str] = {}
    for i, node in enumerate(n for n in graph.nodes if n.op in CALLS):
        names = function_names(node)
        known = [follows[a] for a in node.all_input_nodes if a in follows]
        others = [a for a in node.all_input_nodes if a not in follows]
        if collective in names:
            follows[node] = i, node.name
        elif names & {"wait_tensor"} and known:
            follows[node] = known[0]
        elif names & {"copy_"} and node.args[1] in follows:  # an all-reduce in place, as Transformers has it
            follows[node] = follows[node.args[0]] = follows[node.args[1]]
            tails[node.name] = follows[node][1]
        elif names & _TOKEN_WISE and known and all(_is_replicated(a, node) for a in others):
            follows[node] = max(known)
            tails[node.name] = follows[node][1]
    return tails


def _is_replicated(argument: fx.Node, node: fx.Node) -> bool:
    """Return whether `argument` is a number, a vector (a norm's weight), or a residual that `node` adds.

    Tensor parallelism has these on all ranks; the kernel checks that it is so.
    """
    x, y = fake_value(argument), fake_value(node)
    if not isinstance(x, torch.Tensor) or not isinstance(y, torch.Tensor):
        return True
    if x.dim() <= 1:
        return all(isinstance(size, int) for size in x.shape)
    return "add" in function_names(node) and x.shape == y.shape


class TokenWeaveOptions(Options):
    min_tokens: int = Field(
        2048, ge=1, description="a step is not split if a half would have fewer tokens (paper: 4096 a step)"
    )
    tile: int = Field(128, ge=1, description="tokens of one GEMM tile; the cut is at a multiple of it")
    columns: int = Field(32, ge=1, description="tiles side by side in the widest product: its width / 128 or so")
    multiprocessors: int = Field(132, ge=1, description="tiles that run at once: SMs of the device (H100: 132)")


@register_strategy("token_weave")
class TokenWeave(OpScheduler[TokenWeaveOptions]):
    annotations = (AfterAllReduce("_c10d_functional::all_reduce", "add_norm", Resource.MEMORY, (Tag.REPLICATED,)),)
    fewest_ranks = 2
    looks_for = (TagUse((Tag.REPLICATED,), "no all-reduce is woven, and its schedule is that of nanoflow"),)

    def split(self, batch: Batch) -> Split:
        o = self.options
        cut = weave_point(sum(batch.tokens), o.min_tokens, o.tile, o.columns, o.multiprocessors)
        if not cut:
            return whole(batch, f"a half would have under {o.min_tokens} tokens")
        return cut_at_tokens(batch, [cut], o.min_tokens)

    def schedule(self, s: Schedule) -> None:
        done: set[Task] = set()
        while s.get_ready_ops():
            for micro_batch in range(s.micro_batches):
                for task in s.get_ready_ops(micro_batch):
                    group = self._with_tail(s, task, done)
                    s.execute(group, replace=SHARD_TOKENS if len(group) > 1 else None)
                    done.update(group)
        tails = [o.name for o in s.program.operators if Tag.REPLICATED in o.tags]
        if tails and not s.kernels:
            raise ScheduleError(
                f"token_weave: none of the {len(tails)} operators that follow an all-reduce ({tails[0]} ...) can run "
                "on a shard of the tokens. Where collectives work in place (Transformers), use level='aot'; else use "
                "strategy 'nanoflow'"
            )

    @staticmethod
    def _with_tail(s: Schedule, task: Task, done: set[Task]) -> list[Task]:
        """Return `task` and, if it is an all-reduce, the replicated operators that wait for nothing else."""
        group = [task]
        if Tag.ALL_REDUCE in task.tags and not task.operator.writes:
            for member in group:
                for t in s.successors(member):
                    ready = all(p in done or p in group for p in s.predecessors(t))
                    if t not in group and ready and Tag.REPLICATED in t.tags and _shardable(s.program, t.operator):
                        group.append(t)
        return group


def _shardable(program: Program, op: Operator) -> bool:
    unsharded = (Scope.LOCAL, Scope.PARTIAL)  # a sum over a shard of the tokens is another one
    no_shard = any(program.values[v].scope in unsharded for v in (*op.inputs, *op.outputs))
    return not (no_shard or op.writes or op.reads or op.context)


@lru_cache(maxsize=4096)
def weave_point(tokens: int, least: int, tile: int, columns: int, multiprocessors: int) -> int:
    """Return where to cut `tokens` in two; 0 if nowhere.

    The cut is a multiple of `tile` and leaves `least` tokens on both sides. Of such cuts it makes the fewest waves in
    total, and among equals it is the nearest to the middle.

    Args:
        tokens: tokens of the step.
        least: tokens that each half must have.
        tile: tokens of one tile of a product.
        columns: tiles side by side.
        multiprocessors: tiles that run at once, in one wave.
    """

    def waves(part: int) -> int:
        tiles = math.ceil(part / tile) * columns
        return math.ceil(tiles / multiprocessors)

    cuts = range(tile * max(1, math.ceil(least / tile)), tokens - least + 1, tile)
    return min(cuts, key=lambda c: (waves(c) + waves(tokens - c), abs(2 * c - tokens)), default=0)
