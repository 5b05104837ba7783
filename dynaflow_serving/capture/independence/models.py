"""Rules for the operators of models: attention, convolution, normalisation by statistics, losses.

Contract
- Dimension 0 is the batch, as torch documents for these operators.
- A gradient of a weight is a sum over tokens.
"""

from __future__ import annotations

from dynaflow_serving.capture.independence.case import Case, changed_dims, rule
from dynaflow_serving.capture.independence.placement import WHOLE, Cut, Mixes, Placement, Total, Whole, rows_of
from dynaflow_serving.capture.independence.record import TOKENS

_NONE, _MEAN = 0, 1  # `reduction`, as in ATen


@rule("aten::_scaled_dot_product_flash_attention_for_cpu")
def attention(case: Case) -> list[Placement]:
    cut = _same_sequences(case, "query", "key", "value")
    mask = case.at("attn_mask")
    if isinstance(mask, Cut) and mask.dim - case["attn_mask"].dim() != cut.dim - 4:
        raise Mixes("has a mask over tokens")
    return case.by_size()


@rule("aten::_scaled_dot_product_flash_attention_for_cpu_backward")
def attention_backward(case: Case) -> list[Placement]:
    _same_sequences(case, "grad_out", "query", "key", "value", "out")
    case.cut("logsumexp")
    return case.by_size()


def _same_sequences(case: Case, *names: str) -> Cut:
    """Check that tensors [sequences, heads, positions, size] are cut alike in one of the first two dimensions."""
    cuts = {case.cut(name) for name in names}
    if len(cuts) > 1 or next(iter(cuts)).dim > 1:
        raise Mixes("attends over tokens")
    return cuts.pop()


@rule("aten::convolution")
def convolution(case: Case) -> list[Placement]:
    case.whole("weight", "bias")
    return [_batch(case, "input")]


@rule("aten::convolution_backward")
def convolution_backward(case: Case) -> list[Placement]:
    case.whole("weight")
    batch = _batch(case, "input")
    if case.at("grad_output") != batch:
        raise Mixes("has a gradient that is cut otherwise than the input")
    found: list[Placement] = [batch, Total(), Total()]
    return [p for p, wanted in zip(found, case["output_mask"]) if wanted]


@rule("aten::native_batch_norm", "aten::_native_batch_norm_legit_no_training", "aten::_native_batch_norm_legit",
      "aten::_native_batch_norm_legit_functional", "aten::_batch_norm_with_update", "aten::cudnn_batch_norm",
      "aten::_batch_norm_with_update_functional", "aten::_batch_norm_no_update")  # fmt: skip
def batch_norm(case: Case) -> list[Placement]:
    if case.call.args.get("training", "with_update" in case.call.name):
        raise Mixes("computes statistics over the batch")
    case.whole("weight", "bias", "running_mean", "running_var")
    return [_batch(case, "input"), *[WHOLE] * (len(case.call.results) - 1)]


@rule("aten::native_batch_norm_backward")
def batch_norm_backward(case: Case) -> list[Placement]:
    raise Mixes("sums over the batch, and divides by its size")


@rule("aten::native_group_norm", sizes=("N",))
def group_norm(case: Case) -> list[Placement]:
    _batch(case, "input")
    case.whole("weight", "bias")
    return case.by_size()


@rule("aten::native_group_norm_backward", sizes=("N",))
def group_norm_backward(case: Case) -> list[Placement]:
    case.whole("weight")
    for name in ("grad_out", "input", "mean", "rstd"):
        _batch(case, name)
    found: list[Placement] = [Cut(0), Total(), Total()]
    return [p for p, wanted in zip(found, case["output_mask"]) if wanted]


@rule("aten::nll_loss_forward", "aten::nll_loss2d_forward")
def nll_loss(case: Case) -> list[Placement]:
    case.whole("weight")
    if case.at("target") != _batch(case, "self"):
        raise Mixes("has targets that are cut otherwise than the input")
    if case["reduction"] == _MEAN:
        raise Mixes("averages over the tokens that are not ignored: take the sum, and divide outside of the model")
    return [Cut(0), WHOLE] if case["reduction"] == _NONE else [Total(), Total()]


@rule("aten::nll_loss_backward", "aten::nll_loss2d_backward")
def nll_loss_backward(case: Case) -> list[Placement]:
    case.whole("weight", "total_weight")
    batch = _batch(case, "self")
    if case.at("target") != batch or case.at("grad_output") != (batch if case["reduction"] == _NONE else WHOLE):
        raise Mixes("has a gradient or targets that are cut otherwise than the input")
    return [batch]


def _batch(case: Case, name: str) -> Cut:
    cut = case.cut(name)
    if cut.dim != 0:
        raise Mixes("mixes tokens along the token axis")
    return cut


@rule(*(f"aten::{kind}_pad{n}d" for kind in ("reflection", "replication") for n in (1, 2, 3)))
def pad(case: Case) -> list[Placement]:
    cut, padded = case.cut("self"), int(case.call.name[-2])
    if cut.dim >= case["self"].dim() - padded:
        raise Mixes("repeats tokens at the border")
    return [cut]


@rule("aten::copy", "aten::_conj_physical")
def element_by_element(case: Case) -> list[Placement]:
    rank = case.call.results[0][0].dim()
    cuts = {(p.dim + rank - t.dim(), p.copies) for t in case.call.tensors if isinstance(p := case.placement_of(t), Cut)}
    if len(cuts) > 1 or any(isinstance(p, Total) for p in case.placements()):
        raise Mixes("joins values with different token axes, or with a sum over tokens")
    ((dim, copies),) = cuts
    for tensor in case.call.tensors:
        at = dim - rank + tensor.dim()
        if not isinstance(case.placement_of(tensor), Cut) and at >= 0 and tensor.shape[at] != 1:
            raise Mixes("reads what all tokens share row by row")
    return [Cut(dim, copies)]


@rule("aten::fill", "aten::fill_")
def fill(case: Case) -> list[Placement]:
    case.whole("value")
    source = case.at("self")
    if isinstance(source, Total):
        raise Mixes("fills a sum over tokens")
    return [source]


@rule("aten::_cdist_forward")
def distances(case: Case) -> list[Placement]:
    first, second, rank = case.at("x1"), case.at("x2"), case.call.results[0][0].dim()
    if isinstance(first, Cut) and isinstance(second, Cut):
        if first != second or first.dim >= rank - 2:
            raise Mixes("measures distances between tokens")
        return [first]
    if isinstance(first, Cut) and isinstance(second, Whole) and first.dim == case["x1"].dim() - 2:
        return [Cut(rank - 2, first.copies)]
    if isinstance(first, Whole) and isinstance(second, Cut) and second.dim == case["x2"].dim() - 2:
        return [Cut(rank - 1, second.copies)]
    raise Mixes("measures distances between tokens and what they share row by row")


@rule("aten::_embedding_bag", "aten::_embedding_bag_forward_only")
def embedding_bag(case: Case) -> list[Placement]:
    """Each token has one bag, whose indices are its rows: the bags begin at multiples of their number."""
    case.whole("weight", "per_sample_weights")
    indices, offsets = case.cut("indices"), case.at("offsets")
    rows = rows_of(case["indices"].shape[0], TOKENS[0], indices.copies)
    if not isinstance(offsets, Cut) or offsets.numbered != rows or indices.copies > 1:
        raise Mixes("has bags that need not be those of tokens")
    return [Cut(0), *(Cut(d[0], numbered=1) if (d := changed_dims(pair)) else WHOLE for pair in case.call.results[1:])]
