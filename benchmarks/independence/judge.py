"""A model runs stock and under `dynaflow_serving.compile`, and both must agree.

Contract
- Only the public API is used, so the verdict holds whatever decides inside what may be split.
- A verdict of "split" means that a split step was counted, not only that results are equal.
- "refused" means that no step was split: an error named the reason, or un-split steps were counted with theirs.
- "wrong" and "crash" are those of DynaFlow alone. What `torch.compile` does wrong with its own backend of the same
  level, and what two stock runs do not repeat, is "stock fails".
- Compared are the structure of the result, shapes, types, values, what was written into inputs and buffers, and
  with `gradients` the gradients of inputs and parameters.
- Random operators are seeded alike before each call.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

import dynaflow_serving
from dynaflow_serving.errors import InactiveError, PartitionError

Verdict = Literal["split", "refused", "wrong", "crash", "stock fails", "timeout"]

# In units of the greatest finite value of the tensor, or of 0.1 where that is less: sums cancel to nearly nothing. A
# micro-batch has fewer rows than its batch, so a matmul or a vectorised function may take another kernel that rounds
# otherwise; `aot` rounds in other places, and the gradient of a weight is a sum over rows in another order. In float32
# these differences stay under 1e-5 of the greatest value; a wrong row comes to 1e-2 and more.
TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 3e-2, torch.float32: 1e-4, torch.float64: 1e-11}
SMALLEST_SCALE = 0.1
MOST_EXACT = 2.0**50  # whole numbers in float64, and halves of them, are exact below
STOCK_BACKENDS = {"dynamo": "eager", "aot": "aot_eager", "inductor": "inductor"}


@dataclass(frozen=True)
class Mode:
    """How a case runs under DynaFlow."""

    level: str
    gradients: bool = False
    micro_batches: int = 2

    def __str__(self) -> str:
        return f"{self.level} {'gradients' if self.gradients else 'forward'}"


@dataclass(frozen=True)
class Case:
    """A model and its calls.

    Attributes:
        model: A function or a module. A module is copied before each run, since calls may write into its buffers.
        calls: The positional arguments of each call; all go to one compiled model.
        batch_dim: The dimension of the arguments that is the batch.
        exact: Equal bits are asked for: the case computes with whole numbers.
    """

    model: Callable[..., Any]
    calls: Sequence[tuple[Any, ...]]
    batch_dim: int = 0
    exact: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a case: the verdict, and the reason of any verdict but "split"."""

    verdict: Verdict
    reason: str = ""


class NoGradientError(Exception):
    """Nothing in the result of a case has a gradient."""


def judge(case: Case, mode: Mode) -> Outcome | None:
    """Run a case stock and under DynaFlow.

    Returns:
        The verdict, or None if the mode asks for gradients and the case has none.
    """
    try:
        stock, stock_again = _copied(case.model), _copied(case.model)
        want, again = _run(stock, stock, case, mode), _run(stock_again, stock_again, case, mode)
    except NoGradientError:
        return None
    except Exception as e:
        return Outcome("stock fails", _short(e))
    if difference := _difference(want, again, exact=True):
        return Outcome("stock fails", f"two stock runs differ: {difference}")
    torch._dynamo.reset()
    try:
        outcome = _under_dynaflow(case, mode, want)
    except (PartitionError, InactiveError) as e:
        return Outcome("refused", str(e))
    except TimeoutError:
        raise
    except Exception as e:
        outcome = Outcome("crash", _short(e))
    if outcome.verdict in ("wrong", "crash") and (fault := _fault_of_stock(case, mode, want)):
        return Outcome("stock fails", fault)
    return outcome


def _under_dynaflow(case: Case, mode: Mode, want: Any) -> Outcome:
    model = _copied(case.model)
    options = {"min_tokens": 1, "micro_batches": mode.micro_batches}
    compiled = dynaflow_serving.compile(
        model,
        {"strategy": "nanoflow", "options": options, "check": "never"},  # the proof alone is judged
        batch_dim=case.batch_dim,
        level=mode.level,  # type: ignore[arg-type]
    )
    got = _run(compiled, model, case, mode)
    counts = compiled.session.counts
    if difference := _difference(want, got, case.exact):
        return Outcome("wrong", f"{'split' if counts.split else 'un-split'}: {difference}")
    if counts.split:
        return Outcome("split")
    return Outcome("refused", next(iter(counts.unsplit), "no step: the batch has fewer than two rows"))


def _fault_of_stock(case: Case, mode: Mode, want: Any) -> str:
    """Return what `torch.compile` does wrong with its own backend, or ""."""
    torch._dynamo.reset()
    model = _copied(case.model)
    compiled = torch.compile(model, backend=STOCK_BACKENDS[mode.level])

    def call(*args: Any) -> Any:
        tensors = [a for a in args if isinstance(a, torch.Tensor) and a.dim() > case.batch_dim]
        sizes = Counter(t.shape[case.batch_dim] for t in tensors).most_common(1)
        for tensor in tensors:
            if tensor.shape[case.batch_dim] == sizes[0][0]:
                torch._dynamo.maybe_mark_dynamic(tensor, case.batch_dim)
        return compiled(*args)

    try:
        difference = _difference(want, _run(call, model, case, mode), case.exact)
    except Exception as e:
        return f"torch.compile alone fails: {_short(e)}"
    return f"torch.compile alone differs: {difference}" if difference else ""


def _run(call: Callable[..., Any], model: Callable[..., Any], case: Case, mode: Mode) -> list[Any]:
    """Return all that is compared, per call of the case."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    found = []
    for given in case.calls:
        args = pytree.tree_map(_fresh, given)
        torch.manual_seed(3)
        with torch.set_grad_enabled(mode.gradients):
            result = call(*args)
        gradients = _gradients(result, [*_leaves(args), *parameters]) if mode.gradients else []
        buffers = [b.clone() for b in model.buffers()] if isinstance(model, nn.Module) else []
        found.append(
            pytree.tree_map(_kept, {"result": result, "input": args, "buffer": buffers, "gradient": gradients})
        )
    return found


def _gradients(result: Any, leaves: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return the gradients of a weighted sum of the results: the weights differ, so that a swapped row shows."""
    asked = [t for t in leaves if t.requires_grad and t.is_leaf]
    outputs = [t for t in _leaves(result) if t.requires_grad]
    if not asked or not outputs:
        raise NoGradientError
    weights = [((torch.arange(t.numel()) * 7) % 5 - 2).to(t.dtype).reshape(t.shape) for t in outputs]
    return list(torch.autograd.grad(outputs, asked, weights, allow_unused=True))


def _leaves(tree: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def _fresh(value: Any) -> Any:
    """Return a tensor of the same strides that no other run has written to."""
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


def _kept(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _copied(model: Callable[..., Any]) -> Callable[..., Any]:
    return copy.deepcopy(model) if isinstance(model, nn.Module) else model


def _difference(want: list[Any], got: list[Any], exact: bool) -> str:
    """Return the first difference in words, or ""."""
    for number, (expected, actual) in enumerate(zip(want, got, strict=True)):
        a, spec = pytree.tree_flatten_with_path(expected)
        b, other = pytree.tree_flatten_with_path(actual)
        if spec != other:
            return f"call {number}: the structure of the result"
        for (path, left), (_, right) in zip(a, b, strict=True):
            if text := _leaf_difference(left, right, exact):
                return f"call {number}: {pytree.keystr(path)}: {text}"
    return ""


def _leaf_difference(want: Any, got: Any, exact: bool) -> str:
    if not isinstance(want, torch.Tensor) or not isinstance(got, torch.Tensor):
        same = type(want) is type(got) and (want == got or (want != want and got != got))
        return "" if same else f"{want!r} became {got!r}"
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"{want.dtype} {list(want.shape)} became {got.dtype} {list(got.shape)}"
    if want.layout != got.layout:
        return f"{want.layout} became {got.layout}"
    if want.layout is not torch.strided:
        want, got = want.to_dense(), got.to_dense()
    if want.is_quantized:
        want, got = want.dequantize(), got.dequantize()
    if torch.equal(want, got):
        return ""
    if want.is_complex():
        want, got = torch.view_as_real(want.resolve_conj()), torch.view_as_real(got.resolve_conj())
    a, b = want.double(), got.double()
    finite = a[torch.isfinite(a)]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    loose = want.is_floating_point() and not (exact and scale < MOST_EXACT)
    tolerance = TOLERANCE.get(want.dtype, 0.1) * max(scale, SMALLEST_SCALE) if loose else 0.0
    if torch.allclose(b, a, rtol=0.0, atol=tolerance, equal_nan=True):
        return ""
    apart = float((a - b).abs().nan_to_num(math.inf).max())
    return f"values of {list(want.shape)} are up to {apart:.2g} apart, the greatest is {scale:.2g}"


def _short(e: BaseException) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
