"""`sglang.launch_server` under `sglang.bench_serving`.

Contract
- Requests ask for a given number of greedy tokens, which are this tool's defaults.
- The tool's own warm-up request is left out: `run` has a warm-up pass, and a repeated prompt would meet its prefix.
- Both servers run with `--enable-metrics`, which SGLang leaves off: `server_metrics` reads them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from dynaflow_serving.bench.serving.loads import Load
from dynaflow_serving.bench.serving.tool import HOST, ClientJob, Node, PassFigures, flags, installed, read_figures
from dynaflow_serving.bench.settings import EngineSettings
from dynaflow_serving.bench.sglang_driver import engine_arguments


class SGLangTool:
    """The `ServingTool` of SGLang."""

    variables: dict[str, str] = {}

    def version(self) -> str:
        return installed("sglang")

    def server(self, settings: EngineSettings, port: int, *, gpu: bool, node: Node | None = None) -> list[str]:
        arguments = {"host": HOST, "port": port, "enable_metrics": True, **engine_arguments(settings, gpu=gpu)}
        if node is not None:
            where = f"{node.address}:{node.port}"
            arguments |= {"nnodes": node.count, "node_rank": node.rank, "dist_init_addr": where}
        return [sys.executable, "-m", "sglang.launch_server", *flags(arguments)]

    def bound_to(self, cores: str) -> dict[str, str]:
        return {"SGLANG_CPU_OMP_THREADS_BIND": cores, "OMP_NUM_THREADS": str(cores.count(",") + 1)}

    def client(self, job: ClientJob) -> list[str]:
        return [sys.executable, "-m", "sglang.bench_serving", *self.client_words(job)]

    def client_words(self, job: ClientJob) -> list[str]:
        load = job.load
        arguments = {
            "backend": "sglang",
            "model": job.model,
            "host": HOST,
            "port": job.port,
            "num_prompts": load.requests,
            "request_rate": load.rate,
            "seed": job.seed,
            "warmup_requests": 0,
            "disable_tqdm": True,
            "output_details": True,
            "output_file": job.result,
        }
        if job.dataset is not None:
            arguments |= {"dataset_name": "sharegpt", "dataset_path": job.dataset}
        else:
            # The length is the greatest, the ratio that of the least to it: half to one and a half of the mean.
            arguments |= {
                "dataset_name": "random-ids",
                "tokenize_prompt": True,
                "random_input_len": load.input_len * 3 // 2,
                "random_output_len": load.output_len * 3 // 2,
                "random_range_ratio": 1 / 3,
            }
        return flags(arguments)

    def run_client(self, words: list[str]) -> None:
        from sglang.benchmark.serving import cli_main

        sys.argv[1:] = words
        cli_main()

    def texts(self, result: Mapping[str, Any]) -> list[str]:
        return list(result["generated_texts"])

    def figures(self, content: str, load: Load) -> PassFigures:
        return read_figures(json.loads(content), load, total="total_throughput", e2e="e2e_latency")
