"""An `Integration` describes a system that DynaFlow hooks.

Contract
- A system's own plug-in mechanism calls `plugin.register`, which hooks the system in this process. It is idempotent,
  imports nothing heavy, and changes nothing for processes that do not ask for DynaFlow. Where there is no mechanism,
  the user enables a model.
- A release outside `supported` is an `InactiveError` that names the supported ones. It is raised before weights load.
- In a worker, an integration captures the model, describes each step's batch and enters micro-batches' contexts. It
  does so with a `Session` and a `SplitForward`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from dynaflow_serving.errors import InactiveError

KEY = "dynaflow"  # the config has this key among a system's own arguments


@dataclass(frozen=True)
class Integration:
    """An integration describes one system.

    Attributes:
        name: The name of the system.
        package: The distribution whose version counts.
        supported: The releases that were tested.
    """

    name: str
    package: str
    supported: tuple[str, ...]

    def installed_version(self) -> str | None:
        """Return the installed release, or None."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    def is_supported(self) -> bool:
        """Return whether the installed release was tested; its local part, as in +cpu, does not count."""
        return (self.installed_version() or "").partition("+")[0] in self.supported

    def check_release(self) -> None:
        """Check that the installed release is supported.

        Raises:
            InactiveError: It is not; the message names the supported ones.
        """
        if not self.is_supported():
            raise InactiveError(
                f"DynaFlow supports {self.name} {', '.join(self.supported)}; installed is "
                f"{self.installed_version() or 'none'}. Install a supported release, or remove the dynaflow option to "
                f"run {self.name} as it is."
            )
