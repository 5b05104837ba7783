"""`sglang.launch_server` on CPU."""

import contextlib
import json
import sys
import urllib.request

from dynaflow_serving.bench.serving.server import Server, free_port

OPTIONS = ["--device", "cpu", "--dtype", "float32", "--mem-fraction-static", "0.3", "--max-total-tokens", "4096"]


class SGLangServer(Server):
    @property
    def info(self):
        return json.loads(self.get("/server_info"))

    def generate(self, prompts, new_tokens):
        """Greedy tokens [requests, new_tokens]."""
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        body = json.dumps({"input_ids": prompts, "sampling_params": sampling}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/generate", body, headers)
        with urllib.request.urlopen(request) as reply:
            return [output["output_ids"] for output in json.loads(reply.read())]


@contextlib.contextmanager
def serve(log, model, *options):
    """A server of two ranks that is up; stopped after it. It is not asked for its health, which would be a step."""
    port = free_port()
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--port", str(port)]
    command += [*OPTIONS, "--disable-cuda-graph", "--tp", "2", *options]
    environment = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    server = SGLangServer("sglang", command, port, environment, log)
    try:
        server.wait(300, path="/server_info")
        yield server
    finally:
        server.stop()
