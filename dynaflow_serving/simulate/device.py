"""The hardware of a simulation: a device, the link between the devices of a node, the network between nodes.

Contract
- All ranks are alike and run the same Plan, so one of them is simulated. Group sizes only enter the cost of
  collectives, and thousands of ranks take no longer to simulate than two.
- This symmetry leaves out stragglers, congestion of the network by others, and unequal load, except for the factor
  `imbalance` on the experts' rows.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dynaflow_serving.errors import ConfigError
from dynaflow_serving.simulate.catalogue import Entry, find


class Device(Entry):
    """An accelerator."""

    kind: ClassVar[str] = "device"
    shipped: ClassVar[str] = "devices.yaml"

    sms: int = Field(ge=1, description="multiprocessors")
    tflops: float = Field(gt=0, description="dense 16-bit peak, 1e12 floating-point operations a second")
    memory_gb_s: float = Field(gt=0, description="memory bandwidth, 1e9 bytes a second")
    compute_efficiency: float = Field(default=0.75, gt=0, le=1, description="of the peak, as large GEMMs reach it")
    memory_efficiency: float = Field(default=0.9, gt=0, le=1, description="of the bandwidth, as streaming reaches it")
    launch_us: float = Field(default=2.0, ge=0, description="from one kernel's end to the next one's first useful work")
    issue_us: float = Field(
        6.0, ge=0, description="host time to issue a kernel where no CUDA graph replays it; one thread issues for all"
    )

    @property
    def flops(self) -> float:
        """The reachable operations per second."""
        return self.tflops * 1e12 * self.compute_efficiency

    @property
    def bandwidth(self) -> float:
        """The reachable bytes per second."""
        return self.memory_gb_s * 1e9 * self.memory_efficiency


class Link(Entry):
    """A link between devices or nodes."""

    kind: ClassVar[str] = "link"
    shipped: ClassVar[str] = "links.yaml"

    gb_s: float = Field(gt=0, description="one direction of one device, 1e9 bytes a second")
    latency_us: float = Field(ge=0, description="of one hop of a collective, kernel and protocol included")
    efficiency: float = Field(default=0.8, gt=0, le=1, description="of the bandwidth, as large collectives reach it")
    direct: bool = Field(default=False, description="any two devices reach each other at full rate, as by a switch")
    sms: int = Field(default=16, ge=0, description="multiprocessors that a communication kernel takes from compute")

    @property
    def bandwidth(self) -> float:
        """The reachable bytes per second."""
        return self.gb_s * 1e9 * self.efficiency


class Topology(BaseModel):
    """The ranks 0 to `world` - 1, of which `per_node` adjacent ones share `link`; larger groups use `network` too.

    A tensor-parallel group is `tp` adjacent ranks. There are `dp` such groups, each with a batch of its own. Experts
    are spread over `ep` adjacent ranks; with 1 they are cut like the dense layers, by `tp`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Device
    link: Link
    network: Link
    per_node: int = Field(default=8, ge=1)
    tp: int = Field(default=1, ge=1)
    ep: int = Field(default=1, ge=1)
    dp: int = Field(default=1, ge=1)
    imbalance: float = Field(default=1.0, ge=1, description="rows of the busiest rank's experts over the mean")

    @model_validator(mode="after")
    def _fits(self) -> Topology:
        if self.world % self.ep:
            raise ValueError(f"ep={self.ep} does not divide the {self.world} ranks of tp={self.tp} x dp={self.dp}")
        if self.imbalance > 1 and self.ep == 1:
            raise ValueError(f"imbalance={self.imbalance} is of experts spread over ranks: it needs ep > 1")
        for axis, size in (("tp", self.tp), ("ep", self.ep)):
            if size > self.per_node and size % self.per_node:
                raise ValueError(f"{axis}={size} is over one node of {self.per_node} ranks, but not whole nodes")
        return self

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.tp * self.dp

    @property
    def title(self) -> str:
        """The topology in words: `8 x h100 (nvlink4), tp=8 ep=1 dp=1`."""
        over = f", {self.network.name} between nodes" if self.world > self.per_node else ""
        return f"{self.world} x {self.device.name} ({self.link.name}{over}), tp={self.tp} ep={self.ep} dp={self.dp}"


def make_topology(
    device: str, link: str, network: str, *, per_node: int, tp: int, ep: int, dp: int, imbalance: float
) -> Topology:
    """Return the topology of a device and links that are found by name (`catalogue.find`).

    Raises:
        ConfigError: A name is unknown, or the numbers do not fit together.
    """
    found_device, found_link, found_network = find(Device, device), find(Link, link), find(Link, network)
    try:
        return Topology(
            device=found_device,
            link=found_link,
            network=found_network,
            per_node=per_node,
            tp=tp,
            ep=ep,
            dp=dp,
            imbalance=imbalance,
        )
    except ValidationError as e:
        raise ConfigError("; ".join(str(item["msg"]).removeprefix("Value error, ") for item in e.errors())) from None
