"""The proof that a graph treats tokens independently, so that it may be split.

Contract
- A micro-batch is treated as a virtual device (`placement`). Starting from the inputs, each ATen operator is followed
  by a rule: our own (`case.RULES`), a declaration (`declared`), or torch's sharding rule (`torch_rules`).
- No rule and no declaration: not split. `Proof.reason` names the node of the captured graph and says why.
- The graph is recorded for two numbers of tokens (`record`). A number that differs is allowed only as a size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from dynaflow_serving.capture.independence import collectives, factories, indexing, models, views  # noqa: F401 (rules)
from dynaflow_serving.capture.independence.case import RULES, Case, changed_dims
from dynaflow_serving.capture.independence.declared import as_declared, is_declared
from dynaflow_serving.capture.independence.placement import WHOLE, Cut, Mixes, Placement, Whole, rows_of
from dynaflow_serving.capture.independence.record import FEW_TOKENS, TOKENS, Call, Recording, alone, numbers, record
from dynaflow_serving.capture.independence.torch_rules import ask_torch

# These move elements, and so keep zeros and numbers of tokens what they are.
_MOVES = {"aten::alias", "aten::detach", "aten::clone", "aten::_to_copy", "aten::unsqueeze", "aten::squeeze", "aten::t",
          "aten::transpose", "aten::permute", "aten::view", "aten::_unsafe_view", "aten::expand", "aten::slice",
          "aten::lift_fresh_copy", "aten::select"}  # fmt: skip


@dataclass
class Proof:
    """What is known of the values of a graph.

    Attributes:
        reason: Why the graph cannot be split; "" if it can.
        values: node -> its value for both numbers of tokens.
    """

    reason: str = ""
    values: Mapping[fx.Node, tuple[Any, Any]] = field(default_factory=dict)
    _placements: dict[int, Placement] = field(default_factory=dict)

    def placement(self, node: fx.Node) -> Placement | None:
        """Return the placement of a node's tensor; None if the proof did not get there."""
        value, _ = self.values.get(node, (None, None))
        return self._placements.get(id(value)) if isinstance(value, torch.Tensor) else None


def prove(
    graph: fx.GraphModule,
    pieces: Mapping[str, fx.GraphModule],
    inputs: Mapping[fx.Node, Placement | None],
    fake: Callable[[fx.Node, FakeTensorMode, int], Any],
    trusted: Callable[[fx.Node], bool],
) -> Proof:
    """Prove that a graph treats tokens independently, or say which node does not.

    Args:
        graph: A stitched graph.
        pieces: submodule -> its graph.
        inputs: The placements of the graph's inputs; None for one that must not be read.
        fake: Returns the fake value of an input for a number of tokens.
        trusted: Whether the author of a node's annotation vouches for it, as for an engine's attention.
    """
    walk = _Walk(trusted)
    with alone():
        first, second = (record(graph, pieces, fake, tokens) for tokens in TOKENS)
        for node, placement in inputs.items():
            if isinstance(first.values[node], torch.Tensor):
                walk.known[id(first.values[node])] = placement
        reason = walk.reason(first, second)
        for tokens in FEW_TOKENS if not reason else ():
            reason = reason or _differs(first, second, record(graph, pieces, fake, tokens), tokens)
    values = {n: (a, second.values[n]) for n, a in first.values.items() if n in second.values}
    found = {i: p for i, p in walk.known.items() if p is not None}
    return Proof(reason, values, found)


def _differs(first: Recording, second: Recording, few: Recording, tokens: int) -> str:
    """Return which node behaves otherwise for a few tokens than two larger numbers of them make one expect, or "".

    A node may run other operators, if the shape of its value is as expected. The same operator must have the same
    numbers as arguments.
    """
    if few.failed is not None:
        node, why = few.failed
        return _said(node, f"cannot run for {tokens} tokens: {why}")
    for node, value in few.values.items():
        for a, b, c in zip(*(pytree.tree_leaves(r.values[node]) for r in (first, second)), pytree.tree_leaves(value)):
            if isinstance(a, torch.Tensor) and list(c.shape) != _expected_shape(a, b, tokens):
                return _said(node, f"has another shape than expected for {tokens} tokens")
    usually, otherwise = _by_node(first), _by_node(second)
    for node, calls in _by_node(few).items() if tokens > 1 else ():  # composite operators do less for size 1
        usual, other = usually[node], otherwise[node]
        if [func for func, _ in usual] == [func for func, _ in calls]:
            for (func, args), (_, others), (_, now) in zip(usual, other, calls):
                fixed = {n for n, a in args.items() if numbers(a) == numbers(others[n])}
                if any(numbers(args[n]) != numbers(now[n]) for n in fixed):
                    return _said(node, f"has other arguments than expected for {tokens} tokens", func)
    return ""


def _by_node(recording: Recording) -> dict[fx.Node, list[tuple[torch._ops.OpOverload, dict[str, Any]]]]:
    """Return node -> its operators and their arguments."""
    found: dict[fx.Node, list[tuple[torch._ops.OpOverload, dict[str, Any]]]] = defaultdict(list)
    for node, func, args, _ in recording.calls:
        found[node].append((func, args))
    return found


def _expected_shape(first: torch.Tensor, second: torch.Tensor, tokens: int) -> list[int]:
    """Return the shape for `tokens` tokens: sizes are proportional to the number of tokens, or do not depend on it."""
    pairs = zip(first.shape, second.shape)
    return [a if a == b else a * tokens // TOKENS[0] for a, b in pairs]


class _Walk:
    """Follows the calls of two recordings."""

    def __init__(self, trusted: Callable[[fx.Node], bool]) -> None:
        self.known: dict[int, Placement | None] = {}  # by the id of a tensor, which the recording keeps alive
        self._trusted = trusted
        self._written: set[int] = set()  # storages that hold no zeros any more

    def reason(self, first: Recording, second: Recording) -> str:
        """Return why the graph cannot be split, or ""."""
        for i, (node, func, args, out) in enumerate(first.calls):
            if i >= len(second.calls):
                break
            other_node, other_func, others, other_out = second.calls[i]
            if (node, func) != (other_node, other_func):
                return _said(node, "runs other operators for another number of tokens")
            try:
                self._follow(node, Call(func, args, out, others, other_out))
            except Mixes as problem:
                return _said(node, str(problem), func)
        failed = first.failed or second.failed
        if failed is not None:
            node, why = failed
            return _said(node, why)
        if len(first.calls) != len(second.calls):
            return _said(second.calls[len(first.calls)][0], "runs other operators for another number of tokens")
        return ""

    def _follow(self, node: fx.Node, call: Call) -> None:
        """Note the placements of the results of `call`."""
        case = Case(call, self._placement)
        placements = _placements(case, trusted=self._trusted(node))
        for (tensor, other), placement in zip(call.results, placements, strict=True):
            _check_size((tensor, other), placement)
            before = self.known.get(id(tensor))
            if before is not None and _plain(before) != _plain(placement):
                raise Mixes("writes tokens into memory that is placed otherwise")
            self.known[id(tensor)] = placement
        self._note_writes(call)

    def _placement(self, tensor: torch.Tensor) -> Placement:
        placement = self.known.get(id(tensor), WHOLE)  # what no call made is a constant
        if placement is None:
            raise Mixes("reads an input whose rows may not be adjacent for each token")
        return WHOLE if isinstance(placement, Whole) and _storage(tensor) in self._written else placement

    def _note_writes(self, call: Call) -> None:
        """Check that what `call` writes in place is placed like what it reads, and holds zeros no more."""
        names = {a.name for a in call.func._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
        written = [t for name in names for t in pytree.tree_leaves(call.args[name]) if isinstance(t, torch.Tensor)]
        read = [t for t in call.tensors if all(t is not w for w in written)]
        tokens = any(not isinstance(self._placement(t), Whole) for t in read)
        for tensor in written:
            if tokens and isinstance(self._placement(tensor), Whole):
                raise Mixes("writes tokens into memory that all tokens share")
            self._written.add(_storage(tensor))


def _placements(case: Case, trusted: bool) -> list[Placement]:
    """Return the placements of a call's results, by the rule that fits."""
    call = case.call
    entry = RULES.get(call.name)
    if torch.Tag.nondeterministic_seeded in call.func.tags and not draws_nothing(call.args):
        raise Mixes("draws random numbers, which would be others for each micro-batch")
    inputs = case.placements()
    if all(isinstance(p, Whole) for p in inputs) and not call.changed and not any(map(changed_dims, call.results)):
        zero = bool(inputs) and call.name in _MOVES and all(isinstance(p, Whole) and p.zero for p in inputs)
        return entry.rule(case) if entry and not inputs else case.each(Whole(zero))
    if not call.results and not call.func._schema.is_mutable:
        return []  # an assertion
    if entry is None and (trusted or is_declared(call.name)):
        return as_declared(case)
    if unexpected := call.changed - (entry.sizes if entry else frozenset()):
        raise Mixes(f"computes with the number of tokens (argument {', '.join(sorted(unexpected))})")
    if entry is not None:
        return entry.rule(case)
    return _by_torch(case)


def _by_torch(case: Case) -> list[Placement]:
    """Return the placements by torch's rule, which knows neither copies of the batch nor numbers of tokens."""
    cuts = {p for p in case.placements() if isinstance(p, Cut)}
    copies = {c.copies for c in cuts}
    numbered = max((c.numbered for c in cuts), default=0)
    if numbered and case.call.name not in _MOVES:
        raise Mixes("computes with the numbers of the tokens")
    if len(copies) > 1:
        raise Mixes("joins values that hold the batch differently often")
    plain = Case(case.call, lambda t: _without_copies(case.placement_of(t)))
    found = ask_torch(plain)
    (count,) = copies or {1}
    return [Cut(p.dim, count, numbered) if isinstance(p, Cut) else p for p in found]


def _without_copies(placement: Placement) -> Placement:
    return Cut(placement.dim) if isinstance(placement, Cut) else placement


def draws_nothing(arguments: Mapping[str, Any]) -> bool:
    """Whether a random operator with these arguments, by name, draws nothing (dropout outside of training)."""
    return arguments.get("dropout_p") == 0.0 or arguments.get("train") is False or arguments.get("training") is False


def _check_size(pair: tuple[torch.Tensor, torch.Tensor], placement: Placement) -> None:
    """Check that a result depends on the number of tokens where its placement says, and nowhere else."""
    dims = changed_dims(pair)
    if not isinstance(placement, Cut):
        if dims:
            raise Mixes("has a result that depends on the number of tokens, but has no token axis")
        return
    if len(dims) > 1:
        raise Mixes(f"relates tokens to tokens: shape {tuple(pair[0].shape)} for {TOKENS[0]} tokens")
    if dims != [placement.dim]:
        raise Mixes("reduces or contracts over the token axis")
    rows = {rows_of(t.shape[placement.dim], n, placement.copies) for t, n in zip(pair, TOKENS)}
    if len(rows) > 1 or rows == {0}:
        raise Mixes(f"has {pair[0].shape[placement.dim]} rows for {TOKENS[0]} tokens, not a multiple")


def _plain(placement: Placement) -> Placement:
    return WHOLE if isinstance(placement, Whole) else placement


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _said(node: fx.Node, problem: str, func: Any = None) -> str:
    operator = f" ({func.name()})" if func is not None else ""
    return f"{node.name}{operator} {problem}"
