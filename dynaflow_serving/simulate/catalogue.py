"""Devices, links and model shapes by name, or from a user's YAML file.

Contract
- `find(Kind, name)` returns the shipped entry called `name`, or the content of the YAML file `name` (one mapping).
- An unknown name, field or value is one `ConfigError` that lists the valid ones.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from dynaflow_serving.config import read_mapping
from dynaflow_serving.errors import ConfigError, unknown_name


class Entry(BaseModel):
    """The base of each kind of thing that is found by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: ClassVar[str]  # what errors call it
    shipped: ClassVar[str]  # the file of this package that holds name -> fields

    name: str


E = TypeVar("E", bound=Entry)


def names(cls: type[Entry]) -> list[str]:
    """Return the names of the shipped entries of a kind."""
    return list(_shipped(cls.shipped))


def find(cls: type[E], name: str) -> E:
    """Return the entry called `name`, or the one in the YAML file of that path.

    Raises:
        ConfigError: There is none, or its fields are not valid.
    """
    if Path(name).suffix in (".yaml", ".yml"):
        fields = read_mapping(name, cls.kind, f"of fields. Valid: {', '.join(cls.model_fields)}.")
        return _parse(cls, {"name": Path(name).stem, **fields}, name)
    if name not in _shipped(cls.shipped):
        raise ConfigError(
            unknown_name(cls.kind, name, _shipped(cls.shipped)) + " A path to a .yaml file with its fields works too."
        )
    return _parse(cls, {"name": name, **_shipped(cls.shipped)[name]}, f"{cls.kind} {name!r}")


@cache
def _shipped(file: str) -> dict[str, dict[str, Any]]:
    content: dict[str, dict[str, Any]] = yaml.safe_load((files(__package__) / file).read_text())
    return content


def _parse(cls: type[E], fields: dict[str, Any], where: str) -> E:
    try:
        return cls(**fields)
    except ValidationError as e:
        wrong = []
        for item in e.errors():
            key = ".".join(map(str, item["loc"]))
            if item["type"] == "extra_forbidden":
                wrong.append(unknown_name("field", key, cls.model_fields))
            else:
                wrong.append(f"{key}: {item['msg']}".removeprefix(": "))
        raise ConfigError(f"{where}: {' '.join(wrong)}") from None
