"""`vllm serve MODEL --dynaflow CONFIG` with an OpenAI client, as a user runs it."""

import json

import yaml


def test_served_tokens_equal_offline_stock(server, stock_tokens, prompts, tmp_path):
    from openai import OpenAI

    file = tmp_path / "nanoflow.yaml"
    file.write_text(yaml.safe_dump({"strategy": "nanoflow", "options": {"min_tokens": 1}}))
    running = server("--dynaflow", str(file))
    client = OpenAI(base_url=f"{running.url}/v1", api_key="none")
    answer = client.completions.create(
        model="tiny",
        prompt=prompts,
        max_tokens=12,
        temperature=0,
        extra_body={"ignore_eos": True, "return_token_ids": True},
    )
    tokens = [json.loads(choice.model_dump_json())["token_ids"] for choice in answer.choices]
    assert tokens == stock_tokens("llama")
    text = running.log.read_text()
    assert "DynaFlow is on: strategy nanoflow" in text
    assert "DynaFlow: first split step, 2 micro-batches" in text
