"""One `sglang.Engine` from start to end: settings as JSON on the command line, the outcome as JSON in a file."""

import json
import sys
from pathlib import Path

from one_process import COMMON  # the folder of a script is where it imports from

SETTINGS = COMMON | dict(tp_size=2, chunked_prefill_size=96, enable_mixed_chunk=True)


def main():
    import sglang

    from dynaflow_serving.bench.sglang_driver import SGLangDriver

    request, out = json.loads(sys.argv[1]), sys.argv[2]
    engine = sglang.Engine(model_path=request["model"], **SETTINGS | request["options"])
    sampling = dict(temperature=0, max_new_tokens=12, ignore_eos=True)
    for _ in range(2):  # the second time, all prompts are in the radix cache
        outputs = engine.generate(input_ids=request["prompts"], sampling_params=sampling)
    driver = SGLangDriver()
    driver.engine = engine
    reports = driver.report() if "json_model_override_args" in request["options"] else []
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
