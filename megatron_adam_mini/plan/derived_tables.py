"""What a backend makes of a table of integers, kept with the table.

Imports nothing. Data flow: SegmentTable, ColumnTable, OrderedSums -> **DerivedTables** -> kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any, TypeVar

T = TypeVar("T")


class DerivedTables:
    """Caches what is made of a table. Its form depends on the backend, so the caller makes it."""

    def derived(self, make: Callable[..., T], *key: Hashable) -> T:
        """Return ``make(self, *key)``, computed once and cached with the table."""
        kept: dict[Any, Any] = self._derived
        if (make, key) not in kept:
            kept[make, key] = make(self, *key)
        found: T = kept[make, key]
        return found

    @property
    def derived_bytes(self) -> int:
        """Bytes of all that was made, which has ``nbytes`` or is a list of what has it."""
        lists = [made if isinstance(made, list) else [made] for made in self._derived.values()]
        return sum(part.nbytes for parts in lists for part in parts)

    @cached_property
    def _derived(self) -> dict[Any, Any]:
        return {}
