"""The names of operators and values, which both front-ends give alike.

Contract
- A name follows from module paths and marks only, so that a strategy can rely on it.
"""

from __future__ import annotations

from collections import Counter


def operator_name(module_paths: list[str], marked: str) -> str:
    """Name an operator by its layer and its kind of work, such as `layers.3.attention`.

    Args:
        module_paths: of the modules that the operator's calls run in, in order.
        marked: the name of its annotation; "" for the kind of the module that its calls share.
    """
    paths = [[s for s in path.split(".") if s] for path in module_paths]
    common = _common_prefix(paths)
    if paths and not any(p.isdigit() for p in common):
        # The calls are of two layers (a residual add, the next norm): the last one counts.
        common = paths[-1][: _layer_depth(paths[-1], default=2)]
    common = [p for p in common if p not in ("model", "self", "__self__")]
    depth = _layer_depth(common, default=len(common))
    layer, inside = common[:depth], common[depth:]
    kind = marked or (inside[0] if inside else "compute")
    return ".".join(layer if layer == [kind] else [*layer, kind])


def _common_prefix(paths: list[list[str]]) -> list[str]:
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return common


def _layer_depth(path: list[str], default: int) -> int:
    """Return how many parts of `path` lead to a numbered layer, its number included."""
    return next((i + 1 for i, part in enumerate(path) if part.isdigit()), default)


def unique_names(listed: list[str]) -> list[str]:
    """Number the names that occur several times."""
    total, seen, unique = Counter(listed), Counter[str](), list[str]()
    for name in listed:
        candidate = name
        while total[name] > 1 and (candidate == name or candidate in total or candidate in unique):
            candidate = f"{name}.{seen[name]}"
            seen[name] += 1
        unique.append(candidate)
    return unique


def value_name(operator: str, position: int, outputs: int) -> str:
    """Name a value by the operator that makes it: `mlp`, or `mlp:0` and `mlp:1` where it makes two."""
    return operator if outputs == 1 else f"{operator}:{position}"
