"""Stored rows of a tensor, as the kernels read them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np

from weightsmith.core.keys import Key
from weightsmith.core.task import keeps_masks, keeps_rows, row_step
from weightsmith.engine.context import Context
from weightsmith.io.write.aside import Aside
from weightsmith.kernels.stored import Stored

__all__ = ["StoredRows"]


@dataclass(frozen=True)
class _Marks:
    """What filters keep of some rows of a tensor: until the visit to it ends, and what was noted beyond.

    noted   by an earlier visit, for (rows, what makes it); or None
    lasting whether this visit notes it, too
    """

    rows: Hashable
    here: dict[Hashable, np.ndarray]
    noted: Aside | None
    lasting: bool

    def get(self, which: Hashable) -> np.ndarray | None:
        found = self.here.get(which)
        return self.noted.get((self.rows, which)) if found is None and self.noted is not None else found

    def __setitem__(self, which: Hashable, packed: np.ndarray) -> None:
        if self.noted is None or not self.lasting or not self.noted.put((self.rows, which), packed):
            self.here[which] = packed


class StoredRows:
    """Rows of every expert and of the base; blocks of tensors that are not large are kept, of others the latest.

    lasting  what filters keep is noted for later visits to the tensor (`Context.marks`)
    """

    def __init__(self, key: Key, context: Context, lasting: bool = False) -> None:
        self.key, self._context, self._lasting = key, context, lasting
        self.step = row_step(key, context.measured)
        self.keeps = keeps_rows(key, len(context.inputs.models))
        self._kept: dict[tuple[int, int], Stored] = {}
        self._masks: dict[tuple[int, int], dict[Hashable, np.ndarray]] = {}

    def __call__(self, start: int, stop: int) -> Stored:
        # A merge may have smaller blocks than the passes before it: they are cut out of what is kept.
        low = start - start % self.step
        whole = low, min(low + self.step, self.key.rows)
        kept = self._kept.get(whole)
        if kept is not None and stop <= whole[1]:
            return kept[start - low : stop - low] if (start, stop) != whole and self.key.shape else kept
        found = self._read(start, stop)
        if (start, stop) == whole:
            if not self.keeps:
                self._kept.clear()
            self._kept[whole] = found
        return found

    def _read(self, start: int, stop: int) -> Stored:
        inputs, name = self._context.inputs, self.key.name
        base = None if inputs.base is None or inputs.base.computes(name) else inputs.base
        return Stored(
            experts=[source.bits(name, start, stop) for source in inputs.experts.values()],
            dtypes=[source.key(name).dtype for source in inputs.experts.values()],
            base=None if base is None else base.bits(name, start, stop),
            base_dtype="" if base is None else base.key(name).dtype,
            kept=self._marks(start, stop),
        )

    def _marks(self, start: int, stop: int) -> _Marks:
        context = self._context
        here = self._masks.setdefault((start, stop), {}) if keeps_masks(self.key, len(context.inputs.experts)) else {}
        rows = id(context.inputs), context.seed, self.key.name, start, stop
        return _Marks(rows, here, context.marks, self._lasting)
