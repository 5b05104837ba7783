"""A plan's time on hardware that is not at hand: `dynaflow simulate`.

`device`, `cost` and `model` say what is simulated, `engine` runs it, `scenario` compares schedules. Every figure is
simulated.
"""

from __future__ import annotations

from dynaflow_serving.simulate.catalogue import find, names
from dynaflow_serving.simulate.cost import Demand, Measured, Roofline
from dynaflow_serving.simulate.device import Device, Link, Topology
from dynaflow_serving.simulate.engine import Simulation, simulate
from dynaflow_serving.simulate.model import Shape, decoder
from dynaflow_serving.simulate.scenario import SimulatedSchedule, compare, parse_requests

__all__ = [
    "Demand",
    "Device",
    "Link",
    "Measured",
    "Roofline",
    "Shape",
    "SimulatedSchedule",
    "Simulation",
    "Topology",
    "compare",
    "decoder",
    "find",
    "names",
    "parse_requests",
    "simulate",
]
