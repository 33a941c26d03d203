"""Trees written as orbax checkpoints a few leaves at a time: each is made when its turn comes, and let go when it is on the disk.

Orbax asks the handler of a leaf's type to write all leaves of that type at once. Here the handlers are orbax's own for arrays, but the
leaves are promises of arrays, and a handler is given a few of them and waits until they are written. What is written is what orbax
writes of the arrays themselves.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

ENOUGH = 16 * 2**20
"""Bytes of leaves that are written together if none is larger: one by one, many small ones take long."""


class Later:
    """A JAX array that is yet to be made.

    Attributes:
        path: Of the leaf.
        shape: Of the array.
        dtype: Of the array.
        make: Makes it.
    """

    def __init__(self, path: str, shape: tuple[int, ...], dtype: np.dtype, make: Callable[[], Any]):
        self.path, self.shape, self.dtype, self.make = path, shape, dtype, make

    @property
    def nbytes(self) -> int:
        """The size of the array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class HostLater(Later):
    """A NumPy array that is yet to be made."""


def write(folder: Path, tree: Any, written: Callable[[str], None]) -> None:
    """Writes a tree of ``Later`` leaves into an empty folder, as a checkpoint that ``StandardCheckpointer().restore(folder)`` reads.

    Args:
        folder: To write into.
        tree: What to write.
        written: Called with the path of each leaf that is on the disk.
    """
    turns = _Turns(max((x.nbytes for x in jax.tree.leaves(tree)), default=0), written)
    registry = ocp.type_handlers.create_type_handler_registry(
        (HostLater, _HostArrays(turns)),
        (Later, _Arrays(turns)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # orbax says that none is there, if none is
    )
    inner = folder / "tree"  # orbax wants to make the folder itself, and leaves what it began beside it if it fails
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
            checkpointer.save(inner, args=ocp.args.PyTreeSave(tree))
    except ValueError as error:  # so the storage below says that the disk is full
        if turns.failure is error:
            raise
        raise OSError(f"The checkpoint could not be saved: {error}") from error
    for path in inner.iterdir():
        path.rename(folder / path.name)
    inner.rmdir()


class _Turns:
    """Which leaves are made together, and what went wrong when one was."""

    def __init__(self, largest: int, written: Callable[[str], None]):
        self.limit, self.written = max(largest, ENOUGH), written
        self.failure: BaseException | None = None

    def groups(self, values: Sequence[Later], *others: Sequence[Any]) -> Iterator[tuple[tuple[Any, ...], ...]]:
        """The leaves and what belongs to each, in groups of at most the size of the largest."""
        group: list[tuple[Any, ...]] = []
        size = 0
        for row in zip(values, *others, strict=True):
            if group and size + row[0].nbytes > self.limit:
                yield tuple(zip(*group, strict=True))
                group, size = [], 0
            group.append(row)
            size += row[0].nbytes
        if group:
            yield tuple(zip(*group, strict=True))

    def made(self, values: Iterable[Later]) -> list[Any]:
        """The arrays of some leaves."""
        try:
            return [x.make() for x in values]
        except BaseException as error:
            self.failure = error
            raise


class _InTurn:
    """A handler of arrays made into one of promises."""

    def __init__(self, turns: _Turns, **options: Any):
        super().__init__(**options)
        self._turns = turns

    async def serialize(self, values: Sequence[Later], infos: Sequence[Any], args: Any = None) -> list[Any]:
        """Writes all of them, and waits for it: there is nothing left to wait for."""
        for group in self._turns.groups(values, infos, args or [ocp.SaveArgs()] * len(values)):
            await self._write(*group)
            for value in group[0]:
                self._turns.written(value.path)
        return []

    async def _write(self, values: Sequence[Later], infos: Sequence[Any], args: Sequence[Any]) -> None:
        for future in await super().serialize(self._turns.made(values), list(infos), list(args)):  # type: ignore[misc]
            future.result()


class _Arrays(_InTurn, ocp.type_handlers.ArrayHandler):  # type: ignore[misc]
    pass


class _HostArrays(_InTurn, ocp.type_handlers.NumpyHandler):  # type: ignore[misc]
    def __init__(self, turns: _Turns):
        super().__init__(turns, deepcopy_host_arrays=False)
