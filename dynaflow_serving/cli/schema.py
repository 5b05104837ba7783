"""`dynaflow schema`: JSON Schema of the config file, for editors.

Contract
- The schema is generated from the classes that validate a config, so the two cannot differ.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer


def schema(
    strategy: Annotated[
        str | None, typer.Option("--strategy", "-s", metavar="NAME|FILE", help="Only the options of this strategy.")
    ] = None,
) -> None:
    """Print the JSON Schema of a config file, or of one strategy's options."""
    from dynaflow_serving.policy.selector import json_schema, options_of

    content = json_schema() if strategy is None else options_of(strategy).model_json_schema()
    print(json.dumps(content, indent=2))
