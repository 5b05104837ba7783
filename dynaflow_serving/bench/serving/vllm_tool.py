"""`vllm serve` under `vllm bench serve`.

Contract
- Requests ask for a given number of greedy tokens (`--ignore-eos --temperature 0`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynaflow_serving.bench.serving.loads import Load
from dynaflow_serving.bench.serving.tool import HOST, ClientJob, Node, PassFigures, flags, installed, read_figures
from dynaflow_serving.bench.settings import EngineSettings
from dynaflow_serving.bench.vllm_driver import engine_arguments

COMMAND = [str(Path(sys.executable).with_name("vllm"))]


class VLLMTool:
    """The `ServingTool` of vLLM."""

    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}  # the server wants its engine in another process

    def version(self) -> str:
        return installed("vllm")

    def server(self, settings: EngineSettings, port: int, *, gpu: bool, node: Node | None = None) -> list[str]:
        arguments = engine_arguments(settings)
        model = arguments.pop("model")
        if node is not None:
            arguments |= {
                "nnodes": node.count,
                "node_rank": node.rank,
                "master_addr": node.address,
                "master_port": node.port,
                **({"headless": True} if node.rank else {}),
            }
        return [*COMMAND, "serve", model, *flags({"host": HOST, "port": port, **arguments})]

    def bound_to(self, cores: str) -> dict[str, str]:
        return {"VLLM_CPU_OMP_THREADS_BIND": cores, "OMP_NUM_THREADS": str(cores.count(",") + 1)}

    def client(self, job: ClientJob) -> list[str]:
        return [*COMMAND, "bench", "serve", *self.client_words(job)]

    def client_words(self, job: ClientJob) -> list[str]:
        load = job.load
        arguments = {
            "backend": "vllm",
            "model": job.model,
            "host": HOST,
            "port": job.port,
            "num_prompts": load.requests,
            "request_rate": load.rate,
            "seed": job.seed,
            "ignore_eos": True,
            "temperature": 0,
            "percentile_metrics": "ttft,tpot,itl,e2el",
            "metric_percentiles": 99,
            "disable_tqdm": True,
            "save_result": True,
            "save_detailed": True,
            "result_dir": job.result.parent,
            "result_filename": job.result.name,
        }
        if job.dataset is not None:
            arguments |= {"dataset_name": "sharegpt", "dataset_path": job.dataset, "no_oversample": True}
        else:
            arguments |= {
                "dataset_name": "random",
                "random_input_len": load.input_len,
                "random_output_len": load.output_len,
                "random_range_ratio": 0.5,  # half to one and a half of the mean
            }
        return flags(arguments)

    def run_client(self, words: list[str]) -> None:
        from vllm.benchmarks.serve import add_cli_args, main
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        main(parser.parse_args(words))

    def texts(self, result: Mapping[str, Any]) -> list[str]:
        return list(result["generated_texts"])

    def figures(self, content: str, load: Load) -> PassFigures:
        return read_figures(json.loads(content), load, total="total_token_throughput", e2e="e2el")
