"""Finding a model's borders by the rules of a strategy and an integration, and putting them where frames stop.

Contract
- A `SplitModule` rule makes a border of every module of its class. A `SplitFunc` rule names a Python function or method
  (itself, or its dotted path `package.module.Class.method`), or a torch function or operator (itself, or its name).
  `mark` as a decorator makes a border of the decorated function.
- Modules and Python functions are wrapped where they are looked up, once per process. A torch function mode sees torch
  functions: it costs about a microsecond per torch call, and is on only where a rule names one.
- The outermost border wins: its call runs the borders inside it as they are. Of several rules for one module or
  function the first wins.
- A required rule that matches nothing is an `AnnotationError`. It is raised here for modules and Python functions, and
  after a recording for torch functions.
"""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dynaflow_serving.capture.eager.frames import Border, current_frame
from dynaflow_serving.capture.eager.gradients import join_gradients
from dynaflow_serving.errors import AnnotationError, unknown_name
from dynaflow_serving.strategy.rules import Rule, SplitFunc, SplitModule, target_names

_WRAPPED = "_dynaflow_wrapped"  # attribute of a wrapper: the function that it wraps


class Borders:
    """The borders of one model. `place` puts them where frames of the model stop; `remove` takes them away."""

    def __init__(self, module: torch.nn.Module, rules: Iterable[Rule]) -> None:
        self.module, self.rules = module, tuple(rules)
        self.by_target: dict[Any, Border] = {}  # module or function -> its border
        self.torch_rules: list[SplitFunc] = []
        self._matched_torch_rules: set[int] = set()  # ids of those that have matched a call
        self._torch_borders: dict[Any, Border | None] = {}
        self._undo: list[Callable[[], None]] = []

    def place(self) -> None:
        """Raises `AnnotationError` for a rule that names nothing."""
        for rule in self.rules:
            if isinstance(rule, SplitModule):
                self._place_modules(rule)
            elif isinstance(rule, SplitFunc):
                self._place_function(rule)

    def remove(self) -> None:
        """Give modules their own forward back. Wrappers of functions stay, and call straight through."""
        while self._undo:
            self._undo.pop()()
        self.by_target.clear()

    def frame_function(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return what frames run: `forward`, under a torch function mode where rules name torch functions."""
        if not self.torch_rules:
            return forward

        def under_mode(*args: Any, **kwargs: Any) -> Any:
            with _TorchBorders(self):
                return forward(*args, **kwargs)

        return under_mode

    def torch_border(self, function: Any) -> Border | None:
        """Return the border of `function`, which torch is about to call; None where no rule matches it."""
        if function not in self._torch_borders:
            names = set(target_names(function))
            rule = next((r for r in self.torch_rules if r.matches(function, names)), None)
            self._torch_borders[function] = None if rule is None else Border(rule, function)
        border = self._torch_borders[function]
        if border is not None:
            self._matched_torch_rules.add(id(border.rule))
        return border

    def check_torch_rules(self, called: Iterable[str]) -> None:
        """Raise `AnnotationError` for a required torch function that the recorded model has not called.

        Args:
            called: names of the borders that it has called, for the message.
        """
        for rule in self.torch_rules:
            if rule.required and id(rule) not in self._matched_torch_rules:
                raise AnnotationError(
                    f"SplitFunc({rule.target!r}) matches nothing: the model does not call it between its other borders "
                    f"({', '.join(sorted(set(called))) or 'none'}). Calls inside a border are not seen."
                )

    def _place_modules(self, rule: SplitModule) -> None:
        classes = set()
        found = False
        for path, module in self.module.named_modules():
            if module is self.module:
                continue
            classes.add(type(module).__name__)
            if not rule.matches(type(module)):
                continue
            found = True
            if module in self.by_target:
                continue
            self.by_target[module] = Border(rule, module.forward, path, module)
            module.forward = _wrapper(module, module.forward)
            self._undo.append(functools.partial(module.__dict__.pop, "forward", None))
        if not found and rule.required:
            missing = unknown_name("module class", rule.target_name, classes)
            raise AnnotationError(f"SplitModule matches nothing: {missing}")

    def _place_function(self, rule: SplitFunc) -> None:
        if _is_torch(rule.target):
            self.torch_rules.append(rule)
            return
        try:
            owner, name = _owner(rule.target)
        except (ImportError, AttributeError) as error:
            if rule.required:
                raise AnnotationError(
                    f"SplitFunc({rule.target!r}) matches nothing: {error}. Give the function itself, the dotted path "
                    "package.module.function or package.module.Class.method, or the name of a torch function."
                ) from None
            return
        function = getattr(owner, name)
        original = getattr(function, _WRAPPED, None)
        if original is None:
            original, wrapped = function, _wrapper(function, function)
            setattr(wrapped, _WRAPPED, function)
            setattr(owner, name, wrapped)
            if not isinstance(owner, type):
                _replace_imports(function, wrapped)
        self.by_target.setdefault(original, Border(rule, original))


def marked_border(function: Callable[..., Any], rule: SplitFunc) -> Callable[..., Any]:
    """Return `function` as a border of every frame that calls it, for `mark` as a decorator."""
    border = Border(rule, function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling() and (frame := current_frame()) is not None:
            return frame.suspend(border, args, kwargs)
        return function(*args, **kwargs)

    return call


def _wrapper(target: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with a stop where the running frame has a border for `target`."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        frame = current_frame()
        if frame is not None and (border := frame.borders.get(target)) is not None:
            return frame.suspend(border, args, kwargs)
        join_gradients()
        return function(*args, **kwargs)

    return call


class _TorchBorders(TorchFunctionMode):
    """Stops the running frame at the torch functions that rules name."""

    def __init__(self, borders: Borders) -> None:
        super().__init__()
        self._borders = borders

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = current_frame()
        border = self._borders.torch_border(func) if frame is not None else None
        if frame is None or border is None:
            return func(*args, **(kwargs or {}))
        return frame.suspend(border, tuple(args), kwargs or {})


def _is_torch(target: Any) -> bool:
    if isinstance(target, str):  # `silu`, `aten.mm`, `vllm::all_reduce`, but not `package.module.function`
        return "::" in target or target.partition(".")[0] in ("aten", "prims", "_c10d_functional") or "." not in target
    module = getattr(target, "__module__", None) or ""
    operator = isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
    return operator or module.partition(".")[0] in ("torch", "_operator")


def _owner(target: Any) -> tuple[Any, str]:
    """Return the module or class that a function is looked up in, and its name there.

    Raises:
        ImportError: the module of a dotted path cannot be imported.
        AttributeError: there is no such function, or it is local to another.
    """
    if isinstance(target, str):
        owner, names = _import_prefix(target)
    else:
        owner, names = sys.modules[target.__module__], target.__qualname__.split(".")
        if "<locals>" in names:
            raise AttributeError(f"{target.__qualname__} is local to a function; use dynaflow_serving.mark there")
    for name in names[:-1]:
        owner = getattr(owner, name)
    getattr(owner, names[-1])
    return owner, names[-1]


def _import_prefix(dotted: str) -> tuple[Any, list[str]]:
    """Import the longest prefix of `dotted` that is a module; return it and the names that follow."""
    parts = dotted.split(".")
    for length in range(len(parts) - 1, 1, -1):
        try:
            return importlib.import_module(".".join(parts[:length])), parts[length:]
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith(parts[0]):  # the module is there, and imports one that is not
                raise
    return importlib.import_module(parts[0]), parts[1:]


def _replace_imports(function: Callable[..., Any], wrapped: Callable[..., Any]) -> None:
    """Put `wrapped` where other modules have imported `function` by name."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is function:
                setattr(module, name, wrapped)
