"""One `sglang.launch_server` in a process group of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

OPTIONS = ["--device", "cpu", "--dtype", "float32", "--mem-fraction-static", "0.3", "--max-total-tokens", "4096"]


class Server:
    def __init__(self, process, port):
        self.process, self.url = process, f"http://127.0.0.1:{port}"

    def get(self, path, seconds=300):
        """The reply, as soon as there is one."""
        for _ in range(seconds):
            assert self.process.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(self.url + path, timeout=5) as reply:
                    return reply.read().decode()
            except (urllib.error.URLError, OSError):
                time.sleep(1)
        raise TimeoutError(path)

    @property
    def info(self):
        return json.loads(self.get("/server_info"))

    def generate(self, prompts, new_tokens):
        """Greedy tokens [requests, new_tokens]."""
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        body = json.dumps({"input_ids": prompts, "sampling_params": sampling}).encode()
        request = urllib.request.Request(f"{self.url}/generate", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as reply:
            return [output["output_ids"] for output in json.loads(reply.read())]


@contextlib.contextmanager
def serve(model, *options, ranks=1):
    """A server that is up; killed after it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", model, "--port", str(port)]
    command += [*OPTIONS, "--disable-cuda-graph", "--tp", str(ranks), *options]
    environment = {**os.environ, "SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))}
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        server = Server(process, port)
        server.get("/server_info")
        yield server
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
