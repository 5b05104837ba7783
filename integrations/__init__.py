"""Engine integrations, one package each, against the protocol in `base`."""

from dynaflow_serving.integrations.base import Integration
from dynaflow_serving.integrations.sglang import SGLangIntegration
from dynaflow_serving.integrations.transformers import TransformersIntegration
from dynaflow_serving.integrations.vllm import VLLMIntegration

INTEGRATIONS: dict[str, Integration] = {
    i.name: i for i in (VLLMIntegration(), SGLangIntegration(), TransformersIntegration())
}

__all__ = ["INTEGRATIONS", "Integration"]
