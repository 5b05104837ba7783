"""SGLang: `python -m sglang.launch_server ... --dynaflow CONFIG`; `plugin` is where SGLang enters."""
