"""dynaflow_serving: programmable operator schedules inside LLM serving engines.

Importing this package needs torch and light libraries only; engines are imported inside functions.
"""

from dynaflow_serving.annotations import SplitFunc, SplitModule, mark
from dynaflow_serving.config import Config, load
from dynaflow_serving.errors import DynaflowError, InactiveError, PlanError
from dynaflow_serving.ir import Batch, MicroBatch, Operator, Plan, Program, Resource, Split
from dynaflow_serving.scheduler import OpScheduler, Options, Schedule
from dynaflow_serving.strategies import register_strategy
from dynaflow_serving.torch_backend import compile
from dynaflow_serving.verify import verify

__version__ = "0.1.0"

__all__ = [
    "Batch", "Config", "DynaflowError", "InactiveError", "MicroBatch", "OpScheduler", "Operator", "Options", "Plan",
    "PlanError", "Program", "Resource", "Schedule", "Split", "SplitFunc", "SplitModule", "compile", "load", "mark",
    "register_strategy", "verify",
]  # fmt: skip
