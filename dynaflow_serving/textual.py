"""What Programs and Plans share: a text form that round-trips, and a digest that ranks can compare."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Self


class Textual:
    def to_text(self) -> str:
        from dynaflow_serving import text

        return text.dump(self)

    @classmethod
    def from_text(cls, source: str) -> Self:
        """Raises `TextError` with the line number and the line."""
        from dynaflow_serving import text

        return text.parse(cls, source)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.to_text().encode()).hexdigest()[:16]
