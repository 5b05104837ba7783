"""torch's own sharding rules (DTensor) as rules of the proof; the only module that touches their private parts.

Contract
- A micro-batch is a device of a mesh of two. There is no process group, and nothing is computed or sent.
- An operator may be split if torch's rule needs no communication for the given placements. A redistribution that would
  slice a tensor that all devices hold is none for torch, but is one for us: nobody cuts what micro-batches share.
- `check_torch` refuses a release of torch whose private parts have changed, by name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree

from dynaflow_serving.capture.independence.case import Case
from dynaflow_serving.capture.independence.placement import Cut, Mixes, Placement, Total, Whole
from dynaflow_serving.errors import InactiveError

DEVICES = 2

# What is used, with the parameters that it must have. Checked with torch 2.11 to 2.14.
_NEEDED = {
    "DTensorSpec": ("mesh", "placements", "tensor_meta"),
    "OpSchema": ("op", "args_schema", "kwargs_schema", "schema_info"),
    "DeviceMesh": ("device_type", "mesh", "_init_backend", "_rank"),
}


@functools.cache
def _parts() -> dict[str, Any]:
    """Return the private parts of torch that are used here.

    Raises:
        InactiveError: This release of torch does not have them.
    """
    if not torch.distributed.is_available():
        raise InactiveError("this build of torch has no torch.distributed, whose rules prove that a model may be split")
    try:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
        from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
        from torch.distributed.tensor._op_schema import OpSchema

        propagator = DTensor._op_dispatcher.sharding_propagator
        parts: dict[str, Any] = {
            "DTensorSpec": DTensorSpec, "TensorMeta": TensorMeta, "OpSchema": OpSchema, "DeviceMesh": DeviceMesh,
            "Partial": Partial, "Replicate": Replicate, "Shard": Shard,
            "propagate": propagator.propagate_op_sharding_non_cached, "propagator": propagator,
        }  # fmt: skip
    except (ImportError, AttributeError) as error:
        raise _changed(str(error)) from None
    for name, parameters in _NEEDED.items():
        if missing := set(parameters) - set(inspect.signature(parts[name]).parameters):
            raise _changed(f"{name} has no parameter {sorted(missing)[0]!r}")
    return parts


def _changed(what: str) -> InactiveError:
    return InactiveError(
        f"torch {torch.__version__} keeps its sharding rules elsewhere than torch 2.11 to 2.14 ({what}): DynaFlow "
        "cannot prove that a model may be split; install one of these releases"
    )


@functools.cache
def _mesh() -> Any:
    return _parts()["DeviceMesh"]("cpu", torch.arange(DEVICES), _init_backend=False, _rank=0)


# Layers repeat: a call with the same arguments, but for the values of tensors, has the same answer.
_answers: dict[Any, list[Placement] | str] = {}


def ask_torch(case: Case) -> list[Placement]:
    """Return the placements of the results by torch's rule.

    Raises:
        Mixes: torch has no rule, or its rule needs communication.
        InactiveError: This release of torch is not supported.
    """
    described = pytree.tree_map_only(torch.Tensor, lambda t: _key(case, t), case.call.args)
    key = case.call.func, repr(described)
    if key not in _answers:
        try:
            _answers[key] = _ask(case)
        except Mixes as problem:
            _answers[key] = str(problem)
    answer = _answers[key]
    if isinstance(answer, str):
        raise Mixes(answer)
    return answer


def _key(case: Case, tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, case.placement_of(tensor)


def _ask(case: Case) -> list[Placement]:
    parts, schema = _parts(), _schema(case)
    try:
        answer = parts["propagate"](schema)
    except NotImplementedError:
        raise _no_rule(case) from None
    except Exception as error:
        raise Mixes(f"has a rule that fails: {type(error).__name__}: {_first_line(error)}") from None
    if answer.output_spec is None and case.call.results:
        raise _no_rule(case)
    if answer.needs_redistribute and answer.redistribute_schema is not None:
        _check_same(_specs(schema), _specs(answer.redistribute_schema))
    found = [_placement(spec) for spec in _spec_leaves(answer.output_spec)]
    if len(found) != len(case.call.results):
        raise Mixes(f"has a rule for {len(found)} results, but {len(case.call.results)} results")
    return found


def _no_rule(case: Case) -> Mixes:
    problem = "has no rule that says whether it keeps tokens apart"
    if case.call.name.startswith(("aten::", "prims::")):
        return Mixes(problem)
    return Mixes(f"{problem}; if it does, declare it: row_wise({case.call.name!r}), or row_wise in the YAML")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:120]


def _schema(case: Case) -> Any:
    """Return torch's description of a call on devices."""
    parts, func = _parts(), case.call.func
    specified = pytree.tree_map_only(torch.Tensor, functools.partial(_spec, case.placement_of), dict(case.call.args))
    arguments = func._schema.arguments
    args = [specified[a.name] for a in arguments if not a.kwarg_only]
    defaults = [a.default_value for a in arguments if not a.kwarg_only]
    while len(args) > _required(func) and not _spec_leaves(args[-1]) and args[-1] == defaults[-1]:
        args.pop()  # rules count the arguments that were given
        defaults.pop()
    kwargs = {a.name: specified[a.name] for a in arguments if a.kwarg_only and specified[a.name] != a.default_value}
    return parts["OpSchema"](func, tuple(args), kwargs, _schema_info(func))


def _required(func: torch._ops.OpOverload) -> int:
    return sum(not a.kwarg_only and not a.has_default_value() for a in func._schema.arguments)


def _schema_info(func: torch._ops.OpOverload) -> Any:
    """Return what torch's rules know of the arguments (whether lists have to be flattened)."""
    for name in ("op_to_schema_info", "op_to_schema_info_for_single_dim_strategy"):
        if (found := getattr(_parts()["propagator"], name, {}).get(func)) is not None:
            return found
    return None


def _spec(placement_of: Callable[[torch.Tensor], Placement], tensor: torch.Tensor) -> Any:
    parts = _parts()
    match placement_of(tensor):
        case Whole():
            placement = parts["Replicate"]()
        case Cut(dim, _, numbered):
            if numbered:
                raise Mixes("numbers the tokens of the batch")
            placement = parts["Shard"](dim)
        case Total(mean):
            placement = parts["Partial"]("avg" if mean else "sum")
    meta = parts["TensorMeta"](tensor.shape, tensor.stride(), tensor.dtype)
    return parts["DTensorSpec"](_mesh(), (placement,), meta)


def _placement(spec: Any) -> Placement:
    parts = _parts()
    (placement,) = spec.placements
    if type(placement) is parts["Replicate"]:
        return Whole()
    if type(placement) is parts["Shard"]:
        return Cut(placement.dim)
    if type(placement) is parts["Partial"] and placement.reduce_op in ("sum", "avg"):
        return Total(mean=placement.reduce_op == "avg")
    raise Mixes(f"leaves each micro-batch with what torch calls {placement}")


def _specs(schema: Any) -> list[Any]:
    """Return the placements of the arguments in torch's description of a call."""
    return [s.placements[0] for s in _spec_leaves([*schema.args_schema, *schema.kwargs_schema.values()])]


def _spec_leaves(nested: Any) -> list[Any]:
    kind = _parts()["DTensorSpec"]
    return [s for s in pytree.tree_leaves(nested, is_leaf=lambda s: isinstance(s, kind)) if isinstance(s, kind)]


def _check_same(have: list[Any], wanted: list[Any]) -> None:
    """Check that torch's rule wants what is there."""
    for a, b in zip(have, wanted, strict=True):
        if a != b and a.is_shard():
            raise Mixes("mixes tokens along the token axis")
        if a != b:
            raise Mixes("reads a sum over tokens, or tokens beside what they share")
