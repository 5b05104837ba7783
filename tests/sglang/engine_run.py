"""One `sglang.Engine` from start to end: settings as JSON on the command line, the outcome as JSON in a file."""

import json
import sys
import tempfile
from pathlib import Path

SETTINGS = dict(
    device="cpu",
    dtype="float32",
    attention_backend="strict",
    max_total_tokens=4096,
    max_running_requests=16,
    mem_fraction_static=0.3,
    disable_cuda_graph=True,
    chunked_prefill_size=96,
    enable_mixed_chunk=True,
    random_seed=0,
)


def main():
    import sglang

    request, out = json.loads(sys.argv[1]), sys.argv[2]
    engine = sglang.Engine(model_path=request["model"], **SETTINGS | request["options"])
    sampling = dict(temperature=0, max_new_tokens=12, ignore_eos=True)
    for _ in range(2):  # the second time, all prompts are in the radix cache
        outputs = engine.generate(input_ids=request["prompts"], sampling_params=sampling)
    reports = []
    if "json_model_override_args" in request["options"]:
        with tempfile.TemporaryDirectory() as folder:
            engine.collective_rpc("dynaflow_report", folder=folder)
            reports = [json.loads(p.read_text()) for p in sorted(Path(folder).iterdir())]
    state = engine.get_server_info()["internal_states"][0]
    engine.shutdown()
    outcome = {
        "tokens": [o["output_ids"] for o in outputs],
        "cached": sum(o["meta_info"]["cached_tokens"] for o in outputs),
        "reports": reports,
        "state": state.get("dynaflow"),
    }
    Path(out).write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
