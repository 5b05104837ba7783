"""DynaFlow declines some models of transformers.

Contract
- `check_model` names the reason before the first forward.
"""

from __future__ import annotations

from typing import Any

from dynaflow_serving.errors import InactiveError


def check_model(model: Any) -> None:
    """Check that `model` can run under DynaFlow.

    Raises:
        InactiveError: It cannot; the message says why.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise InactiveError(
            f"enable() takes a transformers PreTrainedModel, not {type(model).__name__}; for any other PyTorch model "
            "use dynaflow_serving.compile"
        )
    if reason := _declined(model):
        raise InactiveError(
            f"DynaFlow cannot run {type(model).__name__}: {reason}. Use it without DynaFlow, or set fallback: true."
        )


def _declined(model: Any) -> str:
    """Return why `model` is declined, or ""."""
    devices = {p.device for p in model.parameters()}
    if getattr(model.config, "is_encoder_decoder", False):
        return "encoder-decoder models are not supported yet"
    if len(devices) > 1:
        return f"its weights are on {len(devices)} devices (device_map); a plan runs on one"
    if any(d.type == "meta" for d in devices):
        return "its weights are on the meta device"
    if getattr(model, "is_quantized", False):
        return "quantized weights are not supported yet"
    return ""
