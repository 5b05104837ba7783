"""What operators and values are called, by either front-end alike."""

from __future__ import annotations

from collections import Counter


def operator_name(module_paths: list[str], marked: str) -> str:
    """`layers.3.attention`: the innermost layer path that the calls of an operator share, and the kind of work."""
    paths = [[s for s in path.split(".") if s] for path in module_paths]
    common: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    if paths and not any(p.isdigit() for p in common):  # nodes of two layers (a residual add, the next norm)
        common = paths[-1][: next((i + 1 for i, p in enumerate(paths[-1]) if p.isdigit()), 2)]
    common = [p for p in common if p not in ("model", "self", "__self__")]
    depth = next((i + 1 for i, p in enumerate(common) if p.isdigit()), len(common))
    kind = marked or ".".join(common[depth : depth + 1]) or "compute"
    return ".".join([*common[:depth], *([kind] if common[:depth] != [kind] else [])])


def unique_names(listed: list[str]) -> list[str]:
    """Numbered where several would share one."""
    total, seen, unique = Counter(listed), Counter[str](), list[str]()
    for name in listed:
        candidate = name
        while total[name] > 1 and (candidate == name or candidate in total or candidate in unique):
            candidate = f"{name}.{seen[name]}"
            seen[name] += 1
        unique.append(candidate)
    return unique


def value_name(operator: str, position: int, outputs: int) -> str:
    """A value is called like the operator that makes it, whichever front-end saw it: `mlp`, or `mlp:0`, `mlp:1`."""
    return operator if outputs == 1 else f"{operator}:{position}"
