"""The key of a policy table says what its decisions hold for.

Contract
- A key maps names to text. Two runs with equal keys decide alike, apart from noise.
- Settings that change no decision (log folders, budgets, the table's own path) are not part of it.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from dynaflow_serving.session.session import Session
from dynaflow_serving.strategy.selector import Selector

# These settings of a config are not in the executor's entry: `selector_key` has the options, the others decide nothing.
UNTIMED_SETTINGS = {"strategy", "options", "trace", "check", "fallback"}


def engine_key(
    session: Session, model: torch.nn.Module, architecture: Mapping[str, Any], device_type: str
) -> dict[str, str]:
    """Return the entries that the keys of all serving engines share.

    Args:
        session: Its programs, plans, executor options and selector are part of the key.
        model: The engine's own model, whose class is part of the key.
        architecture: The model's HuggingFace config, as a mapping.
        device_type: The type of the worker's device.
    """
    settings = {k: v for k, v in architecture.items() if k != "_name_or_path"}  # a model may be kept anywhere
    return {
        "model": f"{type(model).__name__} {digest(json.dumps(settings, sort_keys=True, default=str))}",
        "executor": session.config.model_dump_json(exclude=UNTIMED_SETTINGS),
        "plans": digest("\n".join(c.texts() for c in session.plan_caches)),
        **programs_key(session),
        **machine_key(device_type),
        **selector_key(session.selector),
    }


def programs_key(session: Session) -> dict[str, str]:
    """Return the entry for the captured programs."""
    return {"programs": " ".join(c.captured.program.digest for c in session.plan_caches)}


def machine_key(device_type: str) -> dict[str, str]:
    """Return the entries that the speed of every model depends on: the device, its threads and our releases."""
    device = torch.cuda.get_device_name() if device_type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device,
        "threads": str(torch.get_num_threads()) if device_type == "cpu" else "",
        "torch": torch.__version__,
        "dynaflow_serving": version("dynaflow-serving"),
    }


def selector_key(selector: Selector) -> dict[str, str]:
    """Return the entries for the candidates, and for the rule by which one is adopted."""
    made = {c: selector.strategy(c).options.model_dump(mode="json") for c in selector.candidates}
    rule = selector.options.model_dump(include={"min_gain", "straddle", "min_collective_kib"})
    return {"candidates": json.dumps(made, sort_keys=True), "rule": json.dumps(rule, sort_keys=True)}


def digest(text: str) -> str:
    """Return 16 hexadecimal digits that stand for `text`."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
