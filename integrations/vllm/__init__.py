"""vLLM: `vllm serve MODEL --dynaflow CONFIG`; `plugin` is where vLLM enters."""
