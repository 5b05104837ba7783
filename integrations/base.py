"""An `Integration` describes a system that DynaFlow hooks.

Contract
- A system's own plug-in mechanism calls `plugin.register`, which hooks the system in this process. It is idempotent,
  imports nothing heavy, and changes nothing for processes that do not ask for DynaFlow. Where there is no mechanism,
  the user enables a model.
- A release outside `supported` is an `InactiveError` that names the supported ones. It is raised before weights load.
- In a worker, an integration captures the model, describes each step's batch and enters micro-batches' contexts. It
  does so with a `Session` and a `SplitForward`.
- `dynaflow bench` runs a system whose ranks are processes like those of torchrun as a `Workload`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Protocol, TypeAlias

from dynaflow_serving.errors import InactiveError

if TYPE_CHECKING:
    import torch

    from dynaflow_serving.config import Config
    from dynaflow_serving.session.session import Session

KEY = "dynaflow"  # the config has this key among a system's own arguments


@dataclass(frozen=True)
class Integration:
    """An integration describes one system.

    Attributes:
        name: The name of the system.
        package: The distribution whose version counts.
        module: Its name for `import`.
        supported: The releases that were tested.
    """

    name: str
    package: str
    module: str
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


@dataclass(frozen=True)
class WorkloadSettings:
    """What `dynaflow bench` was asked to run of a system.

    Attributes:
        model: The model's folder or name, or what the system takes in its place; "" for the system's own default.
        dtype: The name of the model's dtype; "auto" for the model's own.
        requests: The size of the batch.
        length: The tokens of each request, where the system has such.
        training: Whether a pass is forward and backward, instead of forward alone.
        seed: The seed of weights and inputs that are made here.
    """

    model: str
    dtype: str
    requests: int
    length: int
    training: bool
    seed: int


# One pass of the same work; it returns what has to be equal.
Pass: TypeAlias = "Callable[[], list[torch.Tensor]]"


@dataclass(frozen=True)
class WorkloadSide:
    """The same work under a strategy.

    Attributes:
        run: This runs one pass.
        session: The session of the passes, with the Programs that it has captured.
        tune: This has `strategy: auto` decide, by measuring.
        alone: Its "compute" without its collectives, and its "network" without compute; None if captured graphs tell.
    """

    run: Pass
    session: Session
    tune: Callable[[], object]
    alone: Mapping[str, Callable[[], object]] | None = None


class Workload(Protocol):
    """A system on one rank, for `dynaflow bench`.

    Contract
    - Each rank makes one, in a process of its own, where torch.distributed is initialised if there are several ranks.
    - All sides share the model's weights and inputs. Every pass does the same work.
    """

    release: str
    """The release of the system."""

    def __init__(self, settings: WorkloadSettings) -> None:
        """Make the model and its inputs.

        Raises:
            ConfigError: A setting is not valid for this system.
        """

    @property
    def stock(self) -> Pass:
        """The work as the system does it."""

    def under(self, config: Config) -> WorkloadSide:
        """Return the work under DynaFlow.

        Raises:
            DynaflowError: DynaFlow cannot be active.
        """


MERGED_CALLS = "merged calls"  # a peer: the calls of a guidance pair as one call of the stock model
WITHOUT_GUIDANCE = ("flux",)  # models of the bench that make one call per denoising step


class WorkloadWithPeers(Workload, Protocol):
    """A system on one rank, and what its users can do without DynaFlow."""

    @property
    def peers(self) -> Mapping[str, Pass]:
        """The same work in other ways of the stock system, by name."""
