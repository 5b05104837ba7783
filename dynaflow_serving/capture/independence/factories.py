"""Rules for operators that make tensors of a given size.

Contract
- What is filled with one number is cut where its size depends on the number of tokens.
- What numbers the tokens (`arange`) means the same in a micro-batch only as an index of each token's own row.
- A random operator is refused before any rule is asked, even one that all micro-batches would share: each would draw
  anew.
"""

from __future__ import annotations

from dynaflow_serving.capture.independence.case import Case, changed_dims, rule
from dynaflow_serving.capture.independence.placement import WHOLE, ZERO, Cut, Mixes, Placement
from dynaflow_serving.capture.independence.record import TOKENS

_ZEROS = ("aten::zeros", "aten::new_zeros")


@rule(*_ZEROS, "aten::ones", "aten::full", "aten::empty", "aten::new_ones", "aten::new_full", "aten::new_empty",
      "aten::empty_strided", "aten::new_empty_strided", "aten::empty_permuted", sizes=("size", "stride"))  # fmt: skip
def filled(case: Case) -> list[Placement]:
    pair = case.call.results[0]
    if dims := changed_dims(pair):
        return [Cut(dims[0])]
    filled_with = case.call.args.get("fill_value")
    is_zero = case.call.name in _ZEROS or (isinstance(filled_with, int | float) and filled_with == 0)
    return [ZERO if is_zero else WHOLE]


@rule("aten::arange", sizes=("end",))
def arange(case: Case) -> list[Placement]:
    pair = case.call.results[0]
    if not changed_dims(pair):
        return [WHOLE]
    step = case.call.args.get("step", 1)
    if case.call.args.get("start", 0) != 0 or not isinstance(step, int) or pair[0].numel() != TOKENS[0]:
        raise Mixes("numbers the tokens of the batch")
    return [Cut(0, numbered=step)]
