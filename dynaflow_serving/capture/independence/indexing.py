"""Rules for indexing with tensors, and for operators that work along one dimension.

Contract
- Rows that all micro-batches share may be picked by a token's indices, as an embedding does.
- Tokens may be picked only by their own numbers (`Cut.numbered`).
- An operator along a dimension is independent in every other one, if all its large arguments are cut alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dynaflow_serving.capture.independence.case import Case, dim_of, rule, taken
from dynaflow_serving.capture.independence.placement import Cut, Mixes, Placement, Total, Whole
from dynaflow_serving.capture.independence.views import whole_copies


@rule("aten::index", "aten::_unsafe_index")
def index(case: Case) -> list[Placement]:
    source = case.at("self")
    if isinstance(source, Total):
        case.whole("indices")
        return [source]
    _check_indices(case, source)
    return case.by_size()


@rule("aten::index_put", "aten::index_put_", "aten::_unsafe_index_put", "aten::_index_put_impl_")
def index_put(case: Case) -> list[Placement]:
    source, values = case.at("self"), case.at("values")
    if isinstance(source, Cut):
        _check_indices(case, source)
        if isinstance(values, Total) or (isinstance(values, Cut) and values.numbered):
            raise Mixes("writes a sum over tokens to tokens")
        if isinstance(values, Cut) and not _lines_up(case, source):
            raise Mixes("writes tokens to other tokens")
        return [source]
    if isinstance(source, Whole) and source.zero and case.call.args.get("accumulate") and isinstance(values, Cut):
        _check_indices(case, source)
        return [Total()]  # rows of zeros to which each token adds its own
    raise Mixes("writes tokens into memory that all tokens share")


def _lines_up(case: Case, source: Cut) -> bool:
    """Whether values that are cut meet the rows of their own tokens: as many dimensions follow the token axis."""
    picked, values = case["self"][tuple(_as_index(i) for i in case["indices"])], case["values"]
    dims = [d for d, size in enumerate(picked.shape) if size == case["self"].shape[source.dim]]
    placement = case.at("values")
    assert isinstance(placement, Cut)
    return picked.dim() - values.dim() + placement.dim in dims and placement.copies == source.copies == 1


def _as_index(i: Any) -> Any:
    return slice(None) if i is None else i


def _check_indices(case: Case, source: Placement) -> None:
    """Check that each index picks what all tokens share, or a token's own row."""
    indices: Sequence[Any] = case["indices"]
    axes = set()  # the token axes of the indices, counted from the back, as they are broadcast
    for d, i in enumerate(indices):
        if not isinstance(i, torch.Tensor):
            continue
        placement = case.placement_of(i)
        own = isinstance(placement, Cut) and placement.numbered == 1
        on_tokens = isinstance(source, Cut) and d == source.dim
        numbers = isinstance(placement, Cut) and placement.numbered
        if isinstance(placement, Total) or (on_tokens and not own) or (numbers and not on_tokens):
            raise Mixes("picks tokens by a tensor index" if on_tokens else "computes with the numbers of the tokens")
        if isinstance(placement, Cut):
            axes.add((placement.dim - i.dim(), placement.copies))
    if len(axes) > 1 or any(copies > 1 for _, copies in axes):
        raise Mixes("indexes with tensors whose token axes differ")
    if isinstance(source, Cut) and axes and not _indexed(case, source):
        raise Mixes("relates tokens to tokens")


def _indexed(case: Case, source: Cut) -> bool:
    return source.dim < len(case["indices"]) and isinstance(case["indices"][source.dim], torch.Tensor)


def along(*names: str, dim: str = "dim", alike: Sequence[str] = ("self",), default: int | None = None) -> None:
    """Register a rule for operators that work along a dimension.

    Args:
        names: The operators.
        dim: The argument that names the dimension or the dimensions; without a value it is all of them.
        alike: The arguments that must be cut alike. All others must be the same for all micro-batches.
        default: The dimension where the argument has no value.
    """

    @rule(*names)
    def independent_elsewhere(case: Case) -> list[Placement]:
        cuts = {case.cut(name) for name in alike if isinstance(case.call.args.get(name), torch.Tensor)}
        case.whole(*(name for name in case.call.args if name not in alike))
        given = case.call.args.get(dim)
        dims: Sequence[Any] = given if isinstance(given, list | tuple) else [default if given is None else given]
        rank = case["self"].dim()
        if len(cuts) > 1:
            raise Mixes("has arguments whose token axes differ")
        (cut,) = cuts
        if not dims or None in dims or cut.dim in {dim_of(d, rank) for d in dims}:
            raise Mixes("mixes tokens along the token axis")
        return [Cut(p.dim, cut.copies) for p in case.by_size() if isinstance(p, Cut)]


along("aten::argmax", "aten::argmin")
along("aten::index_add", "aten::index_add_", "aten::index_copy", "aten::index_copy_", alike=("self", "source"))
along("aten::scatter_reduce", "aten::scatter_reduce_", "aten::scatter_add_", alike=("self", "index", "src"))
along("aten::unfold", "aten::unfold_copy", dim="dimension")
along("aten::glu", default=-1)


@rule("aten::slice_scatter", sizes=("start", "end"))
def slice_scatter(case: Case) -> list[Placement]:
    cut, dim = case.cut("self"), dim_of(case["dim"], case["self"].dim())
    if cut.dim == dim:
        ranges = [taken(a["self"].shape[dim], a) for a in (case.call.args, case.call.others)]
        if any(r.step != 1 for r in ranges):
            raise Mixes("writes to tokens by position")
        written = whole_copies(cut, case, dim, [(r.start, len(r)) for r in ranges])
    else:
        written = cut
    if case.at("src") != written or (case.call.changed and cut.dim != dim):
        raise Mixes("writes what is placed otherwise")
    return [cut]


@rule("aten::slice_backward", sizes=("input_sizes", "start", "end"))
def slice_backward(case: Case) -> list[Placement]:
    """The gradient of a slice is the gradient of the part, and zeros around it."""
    gradient, sizes = case.at("grad_output"), case["input_sizes"]
    dim = dim_of(case["dim"], len(sizes))
    part, other = (taken(a["input_sizes"][dim], a) for a in (case.call.args, case.call.others))
    if isinstance(gradient, Cut) and gradient.dim == dim:
        if part != range(sizes[dim]):
            raise Mixes("picks tokens by position")
    elif part != other:
        raise Mixes("takes as many elements as there are tokens")
    return [case.cut("grad_output") if isinstance(gradient, Cut) else gradient]


@rule("aten::select_backward", sizes=("input_sizes",))
def select_backward(case: Case) -> list[Placement]:
    """The gradient of a selected element is that in its place, and zeros in the others."""
    gradient, dim = case.at("grad_output"), dim_of(case["dim"], len(case["input_sizes"]))
    if not isinstance(gradient, Cut):
        return [gradient]
    cut = case.cut("grad_output")
    return [Cut(cut.dim + (dim <= cut.dim), cut.copies)]


@rule("aten::renorm", "aten::renorm_")
def renorm(case: Case) -> list[Placement]:
    cut = case.cut("self")
    if cut.dim != dim_of(case["dim"], case["self"].dim()):
        raise Mixes("limits norms over tokens")
    return [cut]


@rule("aten::rot90")
def rot90(case: Case) -> list[Placement]:
    cut, turns = case.cut("self"), case["k"] % 4
    first, second = (dim_of(d, case["self"].dim()) for d in case["dims"])
    if turns == 0 or cut.dim not in (first, second):
        return [cut]
    if (turns, cut.dim) not in ((1, first), (3, second)):  # these reverse the other dimension, then exchange the two
        raise Mixes("mixes tokens along the token axis")
    return [Cut(first + second - cut.dim, cut.copies)]


@rule("aten::searchsorted", "aten::isin")
def against_a_table(case: Case) -> list[Placement]:
    table, values = ("sorted_sequence", "self") if "self" in case.call.args else ("test_elements", "elements")
    if isinstance(case.at(table), Cut) and case.call.name == "aten::searchsorted" and case[table].dim() > 1:
        if case.at(table) != case.at(values) or case.cut(table).dim == case[table].dim() - 1:
            raise Mixes("searches tokens in other tokens")
        return [case.cut(values)]
    case.whole(table, "sorter")
    if case.call.name == "aten::searchsorted" and case[table].dim() > 1:
        raise Mixes("searches tokens in rows that all tokens share")
    return [case.cut(values)]
