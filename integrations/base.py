"""What an engine integration offers, as narrow as the engines let it be.

Contract
- `attach` hooks the engine in this process; it is idempotent, imports the engine itself, and is called by
  the engine's own plugin mechanism, or, where there is none, when a model is enabled. Nothing is changed
  for engines that do not ask for DynaFlow.
- A release outside `supported` is an `InactiveError` naming the supported ones; it is raised before weights load.
- What an integration does in a worker (capture, describe a step's batch, enter a micro-batch's context) it
  does with a `session.Session`, which decides, counts, reports and compares ranks for every engine alike.
"""

from __future__ import annotations

import abc
from importlib.metadata import PackageNotFoundError, version
from typing import ClassVar

from dynaflow_serving.errors import InactiveError


class Integration(abc.ABC):
    """One engine. Instances are listed in `INTEGRATIONS`, for `dynaflow doctor` and `dynaflow bench`."""

    name: ClassVar[str]
    package: ClassVar[str]  # distribution whose version counts
    supported: ClassVar[tuple[str, ...]]  # releases that were tested

    @abc.abstractmethod
    def attach(self) -> None:
        """Hook the engine in this process."""

    def installed_version(self) -> str | None:
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def check_release(self) -> None:
        """Raise `InactiveError` unless the installed release (its local part, as in +cpu, aside) is supported."""
        installed = self.installed_version()
        if installed is None or installed.partition("+")[0] not in self.supported:
            raise InactiveError(
                f"DynaFlow supports {self.name} {', '.join(self.supported)}; installed is {installed or 'none'}. "
                f"Install a supported release, or remove the dynaflow option to run {self.name} as it is."
            )
