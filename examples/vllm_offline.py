"""Offline inference in vLLM: python examples/vllm_offline.py [MODEL]

It prints: 8 answers of 8 tokens; steps split: 8, un-split: {}
"""

import os
import sys

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the report is read from this process

OPTIONS = {"strategy": "nanoflow", "options": {"micro_batches": 2, "min_tokens": 1}}


def main() -> None:
    from vllm import LLM, SamplingParams, TokensPrompt

    from dynaflow_serving.bench.tiny_models import make_tiny_model

    path = sys.argv[1] if len(sys.argv) > 1 else str(make_tiny_model("llama"))
    # The only line that a program needs is additional_config.
    llm = LLM(path, additional_config={"dynaflow": OPTIONS}, max_model_len=512, max_num_seqs=16, dtype="float32")
    prompts = [TokensPrompt(prompt_token_ids=[10 * i + k for k in range(12)]) for i in range(1, 9)]
    answers = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    (report,) = llm.collective_rpc("dynaflow_report")
    tokens = {len(answer.outputs[0].token_ids) for answer in answers}
    steps = report["steps"]
    print(
        f"{len(answers)} answers of {tokens.pop()} tokens; steps split: {steps['split']}, un-split: {steps['unsplit']}"
    )


if __name__ == "__main__":
    main()
