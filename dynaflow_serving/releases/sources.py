"""The Python sources of a release, and the definitions in them, read without importing anything.

Contract
- A release is a wheel, the folder of an installed package, or what pip fetches: a version, or the newest.
- `definitions` finds classes with their members, functions and variables of modules. A member that is inherited is
  found in the class that has it, if that is a class of the same release.
- Only files that define what is looked for are parsed: an engine has some thousand.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dynaflow_serving.errors import ConfigError, DynaflowError
from dynaflow_serving.integrations.base import Integration

Signature = tuple[str, ...]  # the parameters of a function; () for a variable
VARIABLE: Signature = ()
# A class, perhaps below an `if`; a function or a variable of a module.
DEFINED = re.compile(r"(?:^ {0,4}class +|^(?:async )?def +|^(?=\w+ *[:=]))(\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Sources:
    """Where a release's sources are.

    Attributes:
        what: The release in words.
        path: A wheel, or the folder of the package itself.
        module: The package's name for `import`, such as megatron.core.
    """

    what: str
    path: Path
    module: str

    def files(self) -> Iterator[tuple[str, str]]:
        """Yield each Python file of the package: its path below it, and its text."""
        folder = self.module.replace(".", "/")
        if self.path.is_dir():
            for file in sorted(self.path.rglob("*.py")):
                yield file.relative_to(self.path).as_posix(), file.read_text(errors="replace")
            return
        with zipfile.ZipFile(self.path) as wheel:
            for name in sorted(wheel.namelist()):
                if name.startswith(f"{folder}/") and name.endswith(".py"):
                    yield name.removeprefix(f"{folder}/"), wheel.read(name).decode(errors="replace")


def installed(integration: Integration) -> Sources | None:
    """Return the sources of the installed release; None if it is not there, or was not tested."""
    if not integration.is_supported():
        return None
    found = importlib.util.find_spec(integration.module)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations)))
    return Sources(f"{integration.package} {integration.installed_version()}", folder, integration.module)


def given(integration: Integration, path: Path) -> Sources:
    """Return the sources at a path: a wheel, or a folder that is the package or has it.

    Raises:
        ConfigError: There is no such package.
    """
    inner = path.joinpath(*integration.module.split("."))
    place = inner if inner.is_dir() else path
    is_package = place.is_dir() and (inner.is_dir() or place.name == integration.module.rpartition(".")[2])
    if not (is_package or (place.is_file() and zipfile.is_zipfile(place))):
        raise ConfigError(f"{path} is neither a wheel nor a folder with the package {integration.module}")
    return Sources(str(path), place, integration.module)


def downloaded(integration: Integration, version: str, folder: Path) -> Sources:
    """Fetch the wheel of a version, "" for the newest, into `folder`.

    Raises:
        DynaflowError: pip cannot fetch it; the message ends with what pip says.
    """
    what = f"{integration.package}=={version}" if version else integration.package
    # The wheel is only read: it need not fit this Python.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--ignore-requires-python", "--dest", str(folder), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        raise DynaflowError(f"pip cannot fetch {what}: {(done.stderr or done.stdout).strip()[-600:]}")
    _, found, *_ = wheels[0].name.split("-")
    return Sources(f"{integration.package} {found}", wheels[0], integration.module)


@dataclass(frozen=True)
class ClassDefinition:
    """A class as it is written."""

    node: ast.ClassDef

    @cached_property
    def bases(self) -> tuple[str, ...]:
        """The names of its bases, without their modules and parameters."""
        names = (ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in self.node.bases)
        return tuple(name for name in names if name.isidentifier())

    @cached_property
    def members(self) -> dict[str, Signature]:
        """Its own members with their signatures, `VARIABLE` for others; also what its methods set on `self`."""
        members: dict[str, Signature] = {}
        for statement in _statements(self.node.body):
            members |= dict.fromkeys(_assigned(statement), VARIABLE)
            if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
                members[statement.name] = _parameters(statement.args)
                for target in (target for inner in ast.walk(statement) for target in _targets(inner)):
                    if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                        members.setdefault(target.attr, VARIABLE)
        return members


@dataclass
class Definitions:
    """What a release defines.

    Attributes:
        classes: By name, the classes by the file that has them.
        functions: By name, the signatures of a module's functions by file, `VARIABLE` for a module's variables.
    """

    classes: dict[str, dict[str, ClassDefinition]] = field(default_factory=dict)
    functions: dict[str, dict[str, Signature]] = field(default_factory=dict)

    def members(self, owner: str, name: str) -> dict[str, Signature]:
        """Return the signature of a member of the classes called `owner`, by file; inherited ones, too."""
        return {
            file: signature
            for file, definition in self.classes.get(owner, {}).items()
            if (signature := self._member(definition, file, name, {owner})) is not None
        }

    def bases(self) -> set[str]:
        """Return the names of all bases."""
        return {base for homes in self.classes.values() for definition in homes.values() for base in definition.bases}

    def _member(self, definition: ClassDefinition, file: str, name: str, seen: set[str]) -> Signature | None:
        if name in definition.members:
            return definition.members[name]
        for base in definition.bases:
            homes = self.classes.get(base, {})
            # Of several classes of that name, one in the same file is meant, or else any.
            for home in [file] if file in homes else homes:
                inherited = None if base in seen else self._member(homes[home], home, name, seen | {base})
                if inherited is not None:
                    return inherited
        return None


def definitions(sources: Sources, names: Iterable[str]) -> Definitions:
    """Find the classes, functions and variables of a release that have one of these names, and the classes' bases."""
    found, texts = Definitions(), dict(sources.files())
    files: dict[str, set[str]] = {}  # what seems to be defined, by where
    for file, text in texts.items():
        for name in set(DEFINED.findall(text)):
            files.setdefault(name, set()).add(file)
    parsed: set[str] = set()
    while more := {file for name in {*names, *found.bases()} for file in files.get(name, ())} - parsed:
        parsed |= more
        for file in sorted(more):
            for node in _statements(_parse(texts[file])):
                _add(found, file, node)
    return found


def _parse(text: str) -> list[ast.stmt]:
    try:
        return ast.parse(text).body
    except SyntaxError:  # written for a newer Python than this one
        return []


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a body, also those below `if`, `try` and `with`."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try | ast.With):
                yield from _statements(getattr(node, part, ()))
        if isinstance(node, ast.Try):
            for handler in node.handlers:
                yield from _statements(handler.body)


def _add(found: Definitions, file: str, node: ast.stmt) -> None:
    if isinstance(node, ast.ClassDef):
        found.classes.setdefault(node.name, {})[file] = ClassDefinition(node)
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        found.functions.setdefault(node.name, {})[file] = _parameters(node.args)
    else:
        for name in _assigned(node):
            found.functions.setdefault(name, {}).setdefault(file, VARIABLE)


def _parameters(arguments: ast.arguments) -> Signature:
    """Return the parameters as they are written, such as `seed: int=0`; `*` and `/` are of them."""
    parts, depth = [""], 0
    for character in ast.unparse(arguments):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return tuple(part.strip() for part in parts)


def _targets(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def _assigned(node: ast.AST) -> list[str]:
    return [target.id for target in _targets(node) if isinstance(target, ast.Name)]
