"""These are the systems that DynaFlow hooks; each has a package.

Contract
- This registry is data: importing it imports no system and no integration.
"""

from __future__ import annotations

from dynaflow_serving.integrations.base import Integration

VLLM = Integration("vllm", "vllm", "vllm", ("0.32.0",))
SGLANG = Integration("sglang", "sglang", "sglang", ("0.5.23",))
TRANSFORMERS = Integration("transformers", "transformers", "transformers", ("5.19.0",))
MEGATRON = Integration("megatron", "megatron-core", "megatron.core", ("0.16.1", "0.19.2"))
XDIT = Integration("xdit", "xfuser", "xfuser", ("0.7.0",))
FASTVIDEO = Integration("fastvideo", "fastvideo", "fastvideo", ("0.2.1",))

INTEGRATIONS = {i.name: i for i in (VLLM, SGLANG, TRANSFORMERS, MEGATRON, XDIT, FASTVIDEO)}

__all__ = ["FASTVIDEO", "INTEGRATIONS", "MEGATRON", "SGLANG", "TRANSFORMERS", "VLLM", "XDIT", "Integration"]
