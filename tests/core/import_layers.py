"""Imports every module of each layer where no higher layer can be imported: a script, for a fresh interpreter.

It reads one JSON object: the name of a `package`, its `layers` from the bottom up, each a list of modules or packages,
modules to `preload`, which take long to import and know nothing of the package, and modules to be `watched`.

It prints one JSON object with a report for each name of a layer: `upward` imports, modules `skipped` with the reason,
and which watched modules are `loaded` at the end. A name may import itself and lower layers, but no peer of its layer.

Each name has a process of its own, forked when the preloaded modules are there and nothing of the package is. The
`__init__` of the package stands above all layers; it is not run.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import json
import os
import pkgutil
import sys
import types
from collections.abc import Iterator

# A module that needs one of these is skipped where it is not installed.
OPTIONAL = ("diffusers", "fastvideo", "megatron", "ray", "sglang", "transformers", "triton", "vllm", "xfuser")


class Ceiling(importlib.abc.MetaPathFinder):
    """Refuses the names of `package` that are not `allowed`, and remembers them: a module may catch the error."""

    def __init__(self, package: str, allowed: set[str]) -> None:
        self.package, self.allowed, self.refused = package, allowed, set[str]()

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        package, *names = name.split(".")
        if package == self.package and names and names[0] not in self.allowed:
            self.refused.add(name)
            raise ImportError(f"{name} is in a higher layer")


def bare_package(name: str) -> types.ModuleType:
    """The package without what its `__init__` does."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.submodule_search_locations is not None
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    return package


def modules(name: str) -> Iterator[str]:
    """The name, and all modules below it if it is a package that can be imported."""
    yield name
    for found in pkgutil.iter_modules(getattr(sys.modules.get(name), "__path__", ()), name + "."):
        yield from modules(found.name)


def report(package: str, name: str, allowed: set[str], watched: list[str]) -> dict[str, object]:
    sys.modules[package] = bare_package(package)
    ceiling = Ceiling(package, allowed)
    sys.meta_path.insert(0, ceiling)
    upward, skipped = {}, {}
    for module in modules(f"{package}.{name}"):
        ceiling.refused.clear()
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing = (error.name or "").partition(".")[0]
            if not ceiling.refused and missing not in OPTIONAL:
                raise
            if missing in OPTIONAL:
                skipped[module] = f"needs {missing}, which is not installed"
        if ceiling.refused:
            upward[module] = sorted(ceiling.refused)
    return {"upward": upward, "skipped": skipped, "loaded": [m for m in watched if m in sys.modules]}


def in_fork(package: str, name: str, allowed: set[str], watched: list[str]) -> dict[str, object]:
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as out:
            json.dump(report(package, name, allowed, watched), out)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as written:
        text = written.read()
    os.waitpid(child, 0)
    found: dict[str, object] = json.loads(text)
    return found


def main() -> None:
    given = json.load(sys.stdin)
    for module in given["preload"]:
        importlib.import_module(module)
    lower: set[str] = set()
    found = {}
    for layer in given["layers"]:
        for name in layer:
            found[name] = in_fork(given["package"], name, lower | {name}, given["watched"])
        lower |= set(layer)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
