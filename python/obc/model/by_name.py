"""Results by name: a mapping that says why a name has none."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

Value = TypeVar("Value")


class MissingNameError(KeyError):
    """There is no result of this name; the message says why."""


class ByName(Mapping[str, Value], Generic[Value]):
    """A read-only mapping; looking up a missing name raises a :class:`MissingNameError` with the reason."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._values = dict(values)

    @abstractmethod
    def _why_missing(self, name: str) -> str:
        """The message for a name without a value."""

    def __getitem__(self, name: str) -> Value:
        try:
            return self._values[name]
        except KeyError:
            raise MissingNameError(self._why_missing(name)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values
