"""These are all errors that a user can meet.

Contract
- All derive from `DynaflowError`. Each message names the cause and the remedy in one paragraph.
- `unknown_name` is the one wording for a name that does not exist. It lists the valid names and the nearest match.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DynaflowError(Exception):
    """This is the base of all errors that are raised on purpose."""


class ConfigError(DynaflowError):
    """A YAML file, a mapping or a command-line option is wrong."""


class AnnotationError(DynaflowError):
    """An annotation rule matches nothing, or two rules claim one node."""


class PartitionError(DynaflowError):
    """A graph cannot be turned into a Program."""


class ScheduleError(DynaflowError):
    """A strategy asked for something that is not possible."""


class PlanError(DynaflowError):
    """A Plan is not a correct schedule of its Program.

    Attributes:
        action: The index of the offending action, or -1 for none.
    """

    def __init__(self, message: str, action: int = -1) -> None:
        super().__init__(message)
        self.action = action


class TextError(DynaflowError):
    """The text of a Program or Plan cannot be read."""


class InactiveError(DynaflowError):
    """DynaFlow was requested, but cannot be active in this engine, release or mode."""


def unknown_name(what: str, name: str, valid: Iterable[str]) -> str:
    """Return the message for an unknown `name`; `what` says what it should name."""
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {name!r}.{hint} Valid: {', '.join(names) or '(none)'}."
