"""The session of the vLLM worker in this process.

Contract
- `current()` is how vLLM's compile backends, which it calls by name, reach the worker's session; a new
  engine in the same process replaces it.
"""

from __future__ import annotations

import logging
from typing import Any

from dynaflow_serving.config import load
from dynaflow_serving.errors import InactiveError
from dynaflow_serving.integrations.session import Session
from dynaflow_serving.integrations.vllm.engine_args import KEY, PIECE_COMPILER

_current: VLLMSession | None = None


class VLLMSession(Session):
    def __init__(self, vllm_config: Any, device_type: str) -> None:
        global _current
        self.vllm_config = vllm_config
        self.piece_compiler: str = vllm_config.additional_config.get(PIECE_COMPILER, "")
        mode = getattr(vllm_config.compilation_config.mode, "name", "")
        super().__init__(
            load(vllm_config.additional_config[KEY]),
            device_type,
            f"{mode} ({self.piece_compiler or 'vLLM pieces'})",
            logging.getLogger("vllm.dynaflow"),
        )
        _current = self


def current() -> VLLMSession:
    if _current is None:
        raise InactiveError("no DynaFlow worker in this process: the worker class was replaced by another plugin")
    return _current
