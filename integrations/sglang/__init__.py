"""SGLang: entry point of the `sglang.srt.plugins` group.

Contract
- SGLang calls `register` once in every process, and logs and swallows whatever goes wrong in it: nothing is refused
  here. A request is refused where SGLang reads its arguments, and a worker without DynaFlow where it reports ready.
"""

from __future__ import annotations

from dynaflow_serving.integrations.base import Integration


class SGLangIntegration(Integration):
    name = "sglang"
    package = "sglang"
    supported = ("0.5.23",)

    def attach(self) -> None:
        from dynaflow_serving.integrations.sglang import scheduler, server_args

        server_args.attach()
        if (self.installed_version() or "") in self.supported:  # elsewhere the names that are hooked may not exist
            scheduler.attach()


def register() -> None:
    SGLangIntegration().attach()
