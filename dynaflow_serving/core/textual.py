"""What Programs and Plans share: a text form, and a digest of it that ranks can compare."""

from __future__ import annotations

import abc
import hashlib
from collections.abc import Iterator
from functools import cached_property


class Textual(abc.ABC):
    @abc.abstractmethod
    def lines(self) -> Iterator[str]:
        """The text form, line by line."""

    def to_text(self) -> str:
        return "\n".join(self.lines()) + "\n"

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.to_text().encode()).hexdigest()[:16]
