"""docs/user-guide/refusals.md, from the code that refuses: the files `limits.py` of the integrations.

Contract
- `python docs/generate/refusals.py` writes the page; `pages` has the rest of the contract.
- The code is read, not run, so no system has to be installed. A message is text that a function of limits.py returns,
  yields, collects or raises; a value in it is shown by its name in capitals.
- A message ends with its remedy in brackets, as `integrations/limits.py` asks, or in sentences of its own. Features
  that are merely not supported yet are listed by name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from pages import ROOT, generated_by, table, write
from releases import TITLES

PAGE = "user-guide/refusals.md"
INTRODUCTION = """# Refusals and what to do

A wrong strategy, option, path or annotation, an engine release that was not tested, a mode without a graph: each ends
the start, before weights load, with one paragraph that names the cause and what is valid. An annotation of something
that exists, but not in this model, is found when the graph is captured, before serving.

`fallback: true` in the YAML turns "cannot be active" into a warning, and the stock system runs. `dynaflow doctor` shows
what is installed and supported, and `dynaflow check FILE` verifies a plan, a config or a strategy file.

Words in capitals stand for values. All causes of a start are named together.
"""
SHARED = {"integrations/limits.py": "All systems", "integrations/base.py": "Releases"}
MESSAGES = ("InactiveError", "AnnotationError")  # what limits.py raises
NO_REMEDY = "change this, or run without DynaFlow"
SAYING = (ast.Return, ast.Yield, ast.YieldFrom, ast.Assign, ast.AugAssign, ast.Expr)
_REMEDY = re.compile(r"^(?P<cause>.+) \((?P<remedy>[^()]*(?:\([^()]*\)[^()]*)*)\)$", re.DOTALL)
_LISTED = re.compile(" (is|are) not supported yet$")


def pages() -> dict[str, str]:
    """Return the page."""
    parts = [INTRODUCTION]
    for path, title in SHARED.items():
        parts += [f"## {title}\n", _section(ROOT / path)]
    for name, title in TITLES.items():
        file = ROOT / "integrations" / name / "limits.py"
        parts += [f"## {title}\n", _section(file)]
    parts += ["## While capturing and serving\n", _elsewhere()]
    return {PAGE: "\n".join(parts) + generated_by("refusals.py")}


def _section(file: Path) -> str:
    """Return the table of a file's messages, and the features that it declines by name."""
    messages = list(dict.fromkeys(_messages(ast.parse(file.read_text()))))
    listed = [_LISTED.sub("", m) for m in messages if _LISTED.search(m)]
    told = table(("cause", "remedy"), (_split(m) for m in messages if not _LISTED.search(m)))
    told += f"\nNot supported yet, to be left out or run without DynaFlow: {'; '.join(listed)}.\n" if listed else ""
    if whole := _run_whole(ast.parse(file.read_text())):
        told += f"\nA step with a request of these kinds runs un-split, and is counted with the reason: {whole}.\n"
    return told


def _run_whole(tree: ast.Module) -> str:
    """Return what `PER_REQUEST` of a limits.py lists, if it has one."""
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="PER_REQUEST")], value=ast.Dict(values=values)):
                return "; ".join(dict.fromkeys(str(v.value) for v in values if isinstance(v, ast.Constant)))
    return ""


def _elsewhere() -> str:
    """Return the table of errors that other modules raise because DynaFlow cannot be active."""
    found: list[tuple[str, str]] = []
    for folder in ("dynaflow_serving", "integrations"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            path, text = str(file.relative_to(ROOT)), file.read_text()
            if file.name != "limits.py" and path not in SHARED and any(f"raise {name}(" in text for name in MESSAGES):
                raised = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Raise)]
                found += [(message, path) for node in raised for message in _raised(node, {})]
    return table(("message", "raised in"), ((message, f"`{file}`") for message, file in dict(found).items()))


def _split(message: str) -> tuple[str, str]:
    if found := _REMEDY.match(message):
        return found["cause"], found["remedy"]
    cause, _, remedy = message.partition(". ")
    return cause, remedy or NO_REMEDY


def _messages(tree: ast.Module) -> Iterator[str]:
    """Yield the messages of a file, function by function."""
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        tuples = {**_tuples(tree.body), **_tuples(function.body)}
        if function.name in ("unsupported", "check_annotations", "reason_to_run_whole"):
            continue  # features of callers; a strategy's own file; steps that run un-split, which are told apart
        for node in ast.walk(function):
            if isinstance(node, ast.Raise):
                yield from _raised(node, tuples)
            elif isinstance(node, SAYING) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
                yield from _texts(node.value, tuples)


def _tuples(body: list[ast.stmt]) -> dict[str, list[str]]:
    """Return the tuples of texts that `body` names, which comprehensions go through."""
    found = {}
    for node in body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Tuple):
            found[node.targets[0].id] = [str(e.value) for e in node.value.elts if isinstance(e, ast.Constant)]
    return found


def _raised(node: ast.Raise, tuples: Mapping[str, list[str]]) -> Iterator[str]:
    call = node.exc
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in MESSAGES:
        yield from _texts(call.args[0], tuples)


def _texts(node: ast.expr | None, tuples: Mapping[str, list[str]]) -> Iterator[str]:
    """Yield the messages that an expression makes; anything that is no message has no blank in it."""
    match node:
        case ast.Constant(value=str(text)) if " " in text and not text.endswith(":"):
            yield text
        case ast.JoinedStr():
            yield _with_names(node, {})
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            if isinstance(left, ast.JoinedStr | ast.Constant) and isinstance(right, ast.Name | ast.Call):
                yield from (f"{text} {_name(right)}" for text in _texts(left, tuples))
            else:
                yield from [*_texts(left, tuples), *_texts(right, tuples)]
        case ast.List(elts=elements) | ast.Tuple(elts=elements):
            for element in elements:
                yield from _texts(element, tuples)
        case ast.Starred(value=value) | ast.YieldFrom(value=value) | ast.Yield(value=value):
            yield from _texts(value, tuples)
        case ast.IfExp(body=body, orelse=other):
            yield from [*_texts(body, tuples), *_texts(other, tuples)]
        case ast.ListComp(elt=element, generators=[loop]) | ast.GeneratorExp(elt=element, generators=[loop]):
            for names in _values(loop, tuples):
                yield from [_with_names(element, names)] if isinstance(element, ast.JoinedStr) else []
        case ast.Call(func=ast.Name(id="unsupported"), args=[ast.Dict() as features, *_]):
            yield from _features(features)
        case ast.Call(func=ast.Attribute(attr="append"), args=[argument]):
            yield from _texts(argument, tuples)
        case ast.Dict() as features if len(features.keys) > 2:
            yield from _features(features)
        case _:
            return


def _features(features: ast.Dict) -> Iterator[str]:
    for key in features.keys:
        if isinstance(key, ast.JoinedStr | ast.Constant):
            name = _with_names(key, {}) if isinstance(key, ast.JoinedStr) else str(key.value)
            yield f"{name} is not supported yet"


def _values(loop: ast.comprehension, tuples: Mapping[str, list[str]]) -> Iterator[dict[str, str]]:
    """Yield the texts that a loop's variable takes: keys of a dict, or items of a tuple; else nothing is known."""
    target = loop.target.elts[0] if isinstance(loop.target, ast.Tuple) else loop.target
    name = target.id if isinstance(target, ast.Name) else ""
    match loop.iter:
        case ast.Call(func=ast.Attribute(attr="items", value=ast.Dict(keys=keys))):
            yield from ({name: str(key.value)} for key in keys if isinstance(key, ast.Constant))
        case ast.Call(args=[*_, ast.Name(id=listed)]) if listed in tuples:
            yield from ({name: text} for text in tuples[listed])
        case _:
            yield {}


def _with_names(text: ast.JoinedStr, names: Mapping[str, str]) -> str:
    """Return an f-string with the texts of `names`, and other values by their names in capitals."""
    parts = []
    for part in text.values:
        if isinstance(part, ast.Constant):
            parts.append(str(part.value))
        elif isinstance(part, ast.FormattedValue):
            known = names.get(part.value.id) if isinstance(part.value, ast.Name) else None
            parts.append(known or _name(part.value))
    return "".join(parts)


def _name(node: ast.expr) -> str:
    """Return what stands for a value: the last name in its expression, in capitals."""
    match node:
        case ast.Call(func=ast.Attribute(attr="join"), args=[joined]):
            return _name(joined)
        case ast.Call(func=ast.Attribute(attr="lower", value=value)):
            return _name(value)
    found = (n for n in ast.walk(node) if isinstance(n, ast.Attribute | ast.Name))
    names = [n.attr if isinstance(n, ast.Attribute) else n.id for n in found]
    return names[0].strip("_").upper() if names else "VALUE"


if __name__ == "__main__":
    write(pages())
