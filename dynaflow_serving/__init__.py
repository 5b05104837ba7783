"""dynaflow_serving: programmable operator schedules inside LLM serving engines.

Importing this package needs torch and light libraries only; engines are imported inside functions.
"""

from dynaflow_serving.capture.mark import mark
from dynaflow_serving.config import Config, load
from dynaflow_serving.core.batch import Batch, MicroBatch, Split
from dynaflow_serving.core.plan import Plan
from dynaflow_serving.core.program import Operator, Program, Resource
from dynaflow_serving.errors import DynaflowError, InactiveError, PlanError
from dynaflow_serving.planning.verify import verify
from dynaflow_serving.strategy.base import OpScheduler, Options
from dynaflow_serving.strategy.registry import register_strategy
from dynaflow_serving.strategy.rules import SplitFunc, SplitModule
from dynaflow_serving.strategy.schedule import Schedule
from dynaflow_serving.torch_backend import compile

__version__ = "0.1.0"

__all__ = [
    "Batch", "Config", "DynaflowError", "InactiveError", "MicroBatch", "OpScheduler", "Operator", "Options", "Plan",
    "PlanError", "Program", "Resource", "Schedule", "Split", "SplitFunc", "SplitModule", "compile", "load", "mark",
    "register_strategy", "verify",
]  # fmt: skip
