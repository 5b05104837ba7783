"""vLLM: entry point of the `vllm.general_plugins` group.

Contract
- vLLM calls `register` in every process, some of them several times: it is idempotent and cheap.
- vLLM swallows an import error here, but not an exception of `register` itself.
"""

from __future__ import annotations

from dynaflow_serving.integrations.base import Integration


class VLLMIntegration(Integration):
    name = "vllm"
    package = "vllm"
    supported = ("0.32.0",)

    def attach(self) -> None:
        from dynaflow_serving.integrations.vllm import engine_args

        engine_args.attach()


def register() -> None:
    VLLMIntegration().attach()
