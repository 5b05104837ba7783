"""docs/user-guide/configuration.md, from the JSON Schema that `dynaflow schema` prints.

Contract
- `python docs/generate/configuration.py` writes the page; `pages` has the rest of the contract.
- A setting's text is its description in the class that validates it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pages import ROOT, generated_by, table, write

from dynaflow_serving.policy.selector import AUTO, json_schema, options_of, strategy_names

PAGE = "user-guide/configuration.md"
HEADS = ("setting", "value", "default", "what it does")
PARTS = {"streams": "StreamOptions", "trace": "TraceOptions", "check": "CheckOptions"}
INTRODUCTION = """# Configuration

One YAML file configures DynaFlow. The name of a strategy in its place means the strategy with its defaults, and a
mapping works where the file does. `dynaflow schema` prints the JSON Schema for editors, `dynaflow check FILE` verifies
a file. Each folder of `configs/` has commented files for one system. This is `configs/vllm/nanoflow.yaml`:
"""
FOR_CUDA = """A stream may have a share of the multiprocessors or a priority. `graph: whole` makes one CUDA graph of all
streams; vLLM, SGLang, Megatron-LM, xDiT and FastVideo refuse it. All of it is unmeasured.

```yaml
streams: {network: {sm_share: 0.1}}     # or {priority: -1}
graph: whole
```
"""


def pages() -> dict[str, str]:
    """Return the page."""
    schema = json_schema()
    example = (ROOT / "configs" / "vllm" / "nanoflow.yaml").read_text()
    parts = [INTRODUCTION, f"```yaml\n{example}```\n", "## The file\n", _table(schema)]
    for setting, name in PARTS.items():
        part = schema["$defs"][name]
        parts += [f"### {setting}\n", f"{part['description']}\n", _table(part)]
    parts += ["### For CUDA\n", FOR_CUDA]
    parts += ["## Options of `strategy: auto`\n", "[How it decides](auto.md).\n", _table(_options(AUTO))]
    parts.append("## Options of the strategies\n")
    for name in strategy_names():
        if name != AUTO:
            parts += [f"### {name}\n", f"[What it does](../strategies/{name}.md).\n", options_table(name)]
    return {PAGE: "\n".join(parts) + generated_by("configuration.py")}


def _options(strategy: str) -> dict[str, Any]:
    schema: dict[str, Any] = options_of(strategy).model_json_schema()
    return schema


def options_table(strategy: str) -> str:
    """Return the table of a strategy's options."""
    schema = _options(strategy)
    return _table(schema) if schema.get("properties") else "It has no options.\n"


def _table(schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    return table(HEADS, _rows(schema["properties"], required))


def _rows(properties: Mapping[str, Any], required: Any) -> Iterator[tuple[str, str, str, str]]:
    for name, setting in properties.items():
        default = "required" if name in required else _text(setting.get("default"))
        yield f"`{name}`", _value(setting), default, setting.get("description", "")


def _text(default: Any) -> str:
    if default is None:
        return "-"
    return f"`{default if isinstance(default, str) else json.dumps(default)}`"


def _value(schema: Mapping[str, Any]) -> str:
    """Return the values that a setting may have, in words."""
    if "anyOf" in schema:
        return ", or ".join(_value(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "$ref" in schema:
        return "a mapping ([below](#{}))".format({v: k for k, v in PARTS.items()}[schema["$ref"].rsplit("/", 1)[1]])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"a list: {_value(schema['items'])}"
    if isinstance(schema.get("additionalProperties"), dict):
        return f"by name: {_value(schema['additionalProperties'])}"
    return {"object": "a mapping", "string": "text", "boolean": "true or false"}.get(schema["type"]) or _number(schema)


def _number(schema: Mapping[str, Any]) -> str:
    words = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    bounds = [f"{word} {schema[bound]:g}" for bound, word in words.items() if bound in schema]
    return ", ".join([schema["type"], *bounds])


if __name__ == "__main__":
    write(pages())
