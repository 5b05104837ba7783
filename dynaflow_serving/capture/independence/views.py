"""Rules for views and for operators that put tensors together.

Contract
- A reshape is followed exactly: `copies * tokens * rows` elements of the token dimension stay together or are regrouped
  so that each token's are still in one place.
- Copies of the batch, one after the other, come from `cat` and `repeat`; whole copies can be sliced off again.
"""

from __future__ import annotations

import math

import torch

from dynaflow_serving.capture.independence.case import Case, changed_dims, dim_of, rule, taken
from dynaflow_serving.capture.independence.placement import WHOLE, Cut, Mixes, Placement, Total, Whole, rows_of
from dynaflow_serving.capture.independence.record import TOKENS


@rule("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::view_copy", "aten::_reshape_alias",
      sizes=("size", "stride"))  # fmt: skip
def reshape(case: Case) -> list[Placement]:
    source = case.at("self")
    if not isinstance(source, Cut):
        return [source]
    tensor, pair = case["self"], case.call.results[0]
    if "dtype" in case.call.args:  # `view.dtype` changes the size of the last dimension
        if source.dim == tensor.dim() - 1 and tensor.dtype.itemsize != pair[0].dtype.itemsize:
            raise Mixes("regroups the bytes of tokens")
        return [source]
    dims = changed_dims(pair)
    before = math.prod(tensor.shape[: source.dim]) * source.copies
    if len(dims) != 1 or before % (outside := math.prod(pair[0].shape[: dims[0]])):
        raise Mixes("reshapes across the token axis")
    copies = before // outside
    if not rows_of(pair[0].shape[dims[0]], TOKENS[0], copies):
        raise Mixes("reshapes across the token axis")
    if source.numbered and pair[0].shape[dims[0]] != TOKENS[0]:
        raise Mixes("numbers the tokens of the batch")
    return [Cut(dims[0], copies, source.numbered)]


@rule("aten::expand", "aten::expand_copy", sizes=("size",))
def expand(case: Case) -> list[Placement]:
    source, pair = case.at("self"), case.call.results[0]
    if isinstance(source, Cut):
        return [Cut(source.dim + pair[0].dim() - case["self"].dim(), source.copies, source.numbered)]
    dims = changed_dims(pair)
    if dims and isinstance(source, Total):
        raise Mixes("repeats a sum over tokens")
    return [Cut(dims[0]) if dims else source]


@rule("aten::repeat", sizes=("repeats",))
def repeat(case: Case) -> list[Placement]:
    source, repeats = case.at("self"), list(case["repeats"])
    if not isinstance(source, Cut):
        if isinstance(source, Total):
            raise Mixes("repeats a sum over tokens")
        return [Cut(d) for d in changed_dims(case.call.results[0])[:1]] or [source]
    dim = source.dim + len(repeats) - case["self"].dim()
    _not_numbered(source)
    return [Cut(dim, source.copies * repeats[dim])]


@rule("aten::slice", "aten::slice_copy", sizes=("start", "end"))
def slice_(case: Case) -> list[Placement]:
    source = case.at("self")
    dim = dim_of(case["dim"], case["self"].dim())
    ranges = [taken(a["self"].shape[dim], a) for a in (case.call.args, case.call.others)]
    if isinstance(source, Cut) and source.dim == dim:
        if any(r.step != 1 for r in ranges):
            raise Mixes("picks tokens by position")
        return [whole_copies(source, case, dim, [(r.start, len(r)) for r in ranges])]
    if ranges[0] != ranges[1]:
        raise Mixes("takes as many elements as there are tokens")
    return [source]


@rule("aten::split", "aten::split_with_sizes", "aten::unsafe_split", "aten::unsafe_split_with_sizes",
      "aten::split_copy", "aten::split_with_sizes_copy", sizes=("split_size", "split_sizes"))  # fmt: skip
def split(case: Case) -> list[Placement]:
    source = case.at("self")
    dim = dim_of(case["dim"], case["self"].dim())
    if not isinstance(source, Cut) or source.dim != dim:
        if case.call.changed:
            raise Mixes("takes as many elements as there are tokens")
        return case.each(source)
    found: list[Placement] = []
    starts = [0, 0]
    for pair in case.call.results:
        lengths = [part.shape[dim] for part in pair]
        found.append(whole_copies(source, case, dim, list(zip(starts, lengths))))
        starts = [start + length for start, length in zip(starts, lengths)]
    return found


@rule("aten::cat", "aten::concatenate", "aten::concat")
def cat(case: Case) -> list[Placement]:
    tensors: list[torch.Tensor] = [t for t in case["tensors"] if t.shape != (0,)]
    placements = [case.placement_of(t) for t in tensors]
    cuts = [p for p in placements if isinstance(p, Cut)]
    if not cuts:
        if all(p == placements[0] or (isinstance(p, Whole) and p.zero) for p in placements):
            return [placements[0]]
        raise Mixes("puts a sum over tokens beside other values")
    first = cuts[0]
    _not_numbered(*cuts)
    if len(cuts) < len(placements):
        raise Mixes("puts what all tokens share beside tokens")
    if first.dim != dim_of(case["dim"], tensors[0].dim()):
        if any(c != first for c in cuts):
            raise Mixes("puts tensors with different token axes together")
        return [first]
    blocks = {t.shape[first.dim] // c.copies for t, c in zip(tensors, cuts)}
    if len(blocks) > 1 or any(c.dim != first.dim for c in cuts):
        raise Mixes("puts different numbers of rows per token one after the other")
    return [Cut(first.dim, sum(c.copies for c in cuts))]


@rule("aten::as_strided", "aten::as_strided_copy", "aten::as_strided_")
def as_strided(case: Case) -> list[Placement]:
    raise Mixes("reads memory by strides")


def whole_copies(source: Cut, case: Case, dim: int, parts: list[tuple[int, int]]) -> Placement:
    """Return the placement of a part of the token axis, which must be empty or consist of whole copies of the batch.

    Args:
        source: The placement of the argument `self`.
        case: The call.
        dim: The token axis.
        parts: The start and length of the part, for both numbers of tokens.
    """
    found = set()
    for arguments, (start, length) in zip((case.call.args, case.call.others), parts):
        block = arguments["self"].shape[dim] // source.copies
        if start % block or length % block:
            raise Mixes("picks tokens by position")
        found.add((start // block, length // block))
    if len(found) > 1:
        raise Mixes("picks tokens by position")
    (_, copies) = found.pop()
    if not copies:
        return WHOLE
    return Cut(dim, copies, source.numbered)


def _not_numbered(*cuts: Cut) -> None:
    if any(c.numbered for c in cuts):
        raise Mixes("numbers the tokens of the batch")
