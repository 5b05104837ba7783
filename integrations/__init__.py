"""These are the systems that DynaFlow hooks; each has a package.

Contract
- This registry is data: importing it imports no system and no integration.
"""

from __future__ import annotations

from dynaflow_serving.integrations.base import Integration

VLLM = Integration("vllm", "vllm", ("0.32.0",))
SGLANG = Integration("sglang", "sglang", ("0.5.23",))
TRANSFORMERS = Integration("transformers", "transformers", ("5.19.0",))
MEGATRON = Integration("megatron", "megatron-core", ("0.16.1", "0.19.2"))

INTEGRATIONS = {i.name: i for i in (VLLM, SGLANG, TRANSFORMERS, MEGATRON)}

__all__ = ["INTEGRATIONS", "MEGATRON", "SGLANG", "TRANSFORMERS", "VLLM", "Integration"]
