"""Rules for torch's functional collectives, which move rows between ranks.

Contract
- Ranks hold the same tokens, as in tensor parallelism: a collective that works element by element keeps them apart.
- A collective along dimension 0 puts the ranks' blocks one after the other there, or takes them apart.
"""

from __future__ import annotations

from dynaflow_serving.capture.independence.case import Case, rule
from dynaflow_serving.capture.independence.placement import Cut, Mixes, Placement, Total

_LINEAR = ("sum", "avg")


@rule("_c10d_functional::all_reduce", "_c10d_functional::all_reduce_", "_c10d_functional::broadcast",
      "_c10d_functional::broadcast_", "_c10d_functional::wait_tensor", "_c10d_functional_autograd::all_reduce",
      "_c10d_functional::all_reduce_coalesced")  # fmt: skip
def element_by_element(case: Case) -> list[Placement]:
    placements = case.placements()
    if any(isinstance(p, Total) for p in placements) and case.call.args.get("reduce_op", "sum") not in _LINEAR:
        raise Mixes(f"takes the {case['reduce_op']} of sums over tokens")
    return placements[: len(case.call.results)]


@rule("_c10d_functional::all_gather_into_tensor", "_c10d_functional_autograd::all_gather_into_tensor")
def all_gather(case: Case) -> list[Placement]:
    (source, *_) = case.placements()
    if isinstance(source, Cut) and source.dim == 0:
        return [Cut(0, source.copies * case["group_size"])]
    return [source]


@rule("_c10d_functional::reduce_scatter_tensor", "_c10d_functional_autograd::reduce_scatter_tensor")
def reduce_scatter(case: Case) -> list[Placement]:
    (source, *_) = case.placements()
    if isinstance(source, Cut) and source.dim == 0:
        copies, rest = divmod(source.copies, case["group_size"])
        if rest or not copies:
            raise Mixes("gives each rank a part of the tokens")
        return [Cut(0, copies)]
    return [source]


@rule("_c10d_functional::all_to_all_single", "_c10d_functional_autograd::all_to_all_single",
      sizes=("output_split_sizes", "input_split_sizes"))  # fmt: skip
def all_to_all(case: Case) -> list[Placement]:
    (source, *_) = case.placements()
    if isinstance(source, Cut) and source.dim == 0:
        sizes = {*case["output_split_sizes"], *case["input_split_sizes"]}
        if len(sizes) > 1 or source.copies % max(1, len(case["input_split_sizes"])):
            raise Mixes("sends tokens to other ranks")
    return [source]
