"""Whether a call of an NNX module changed its variables, also where values are not known.

``nnx.jit``, ``nnx.remat`` and the like take the variables of a module and give all of them back, changed or not. Values that are known
are compared. Under a trace the call is traced once more, by itself, and its program says which variables leave it as they entered.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jlora import _jax
from jlora._passed import passed
from jlora._text import shown


class Key(NamedTuple):
    """Of an array of a module.

    Attributes:
        part: 0 of a parameter, 1 of other state.
        path: Of its variable.
        at: Where it is in the value of the variable, which may be a tree.
    """

    part: int
    path: tuple[Any, ...]
    at: tuple[Any, ...]

    def __str__(self) -> str:
        return shown("/".join(map(str, self.path)))


class Leaf(NamedTuple):
    """An array of a module; ``counts`` if it is the counter of a random stream."""

    value: Any
    counts: bool


Call = Callable[[Any, Any, Any, Any], tuple[Any, Any, Any]]


def changed(run: Call, given: Sequence[Any], after: Sequence[Any]) -> list[Key]:
    """What a call changed: arrays that are new, or not as before.

    The counter of a random stream is left out if nothing else depends on it: what was drawn with it was not used.

    Args:
        run: ``run(params, state, args, kwargs)`` gives the output of the call, and the parameters and the state after it.
        given: What it was called with.
        after: The parameters and the state that came out, or the parameters alone if any other state may change.
    """
    old, new = _leaves(given[: len(after)]), _leaves(after)
    same = {key: _same(old[key].value, leaf.value) if key in old else False for key, leaf in new.items()}
    unsure = [key for key, it_is in same.items() if it_is is None or (not it_is and new[key].counts and key in old)]
    certain = [key for key, it_is in same.items() if it_is is False and key not in unsure]
    return _traced(run, given, unsure, new) if unsure and not certain else certain


def value_of(variable: Any) -> Any:
    """What a variable holds."""
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable


def _leaves(states: Sequence[Any]) -> dict[Key, Leaf]:
    return {
        Key(part, path, at): Leaf(x, isinstance(variable, nnx.RngCount))
        for part, state in enumerate(states)
        for path, variable in nnx.to_flat_state(state)
        for at, x in jax.tree_util.tree_leaves_with_path(value_of(variable))
    }


def _same(x: Any, y: Any) -> bool | None:
    """Whether two values are equal; ``None`` if that is not known."""
    if x is y:
        return True
    if isinstance(x, jax.core.Tracer) or isinstance(y, jax.core.Tracer):
        return None
    if np.shape(x) != np.shape(y) or len({v.dtype for v in (x, y) if hasattr(v, "dtype")}) > 1:
        return False
    return bool(np.all((x == y) | ((x != x) & (y != y))))  # what was NaN may be NaN


def _traced(run: Call, given: Sequence[Any], keys: Sequence[Key], new: dict[Key, Leaf]) -> list[Key]:
    """Those of ``keys`` that the call changes by what its program says."""
    flat, tree = jax.tree.flatten(given)
    numbered = _leaves(jax.tree.unflatten(tree, range(len(flat)))[:2])
    asked = [numbered[key].value for key in keys]
    known = range(len(jax.tree.leaves(given[:2])), len(flat))  # of the arguments: the module may look at their values
    entering = [
        i
        for i, x in enumerate(flat)
        if isinstance(x, jax.core.Tracer) or i in asked or (i not in known and _is_array(x))
    ]

    def call(*arrays: Any) -> list[Any]:
        values = dict(enumerate(flat)) | dict(zip(entering, arrays, strict=True))
        out, *after = run(*jax.tree.unflatten(tree, values.values()))
        leaves = _leaves(after)
        return [*(leaves[key].value for key in keys), *filter(_is_array, jax.tree.leaves(out))]

    try:
        program = _jax.trace(call, [flat[i] for i in entering])
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        raise ValueError(
            f"Whether the call changes '{keys[0]}' cannot be told: nnx.jit, nnx.remat or the like takes it and gives it back,\n"
            "  and the module looks at values, which are not known where the call is traced to find out.\n"
            "  Leave variables out of it: nnx.remat(f, graph_updates=False), nnx.jit(f, graph_updates=False)."
        ) from error
    inputs = [entering.index(i) for i in asked]
    left = [source != i for source, i in zip(passed(program), inputs, strict=False)]
    counts = [new[key].counts and differs for key, differs in zip(keys, left, strict=True)]
    others = len(program.jaxpr.outvars) - len(keys)
    read = _jax.inputs_read(program, [not c for c in counts] + [True] * others)
    rows = zip(keys, left, counts, inputs, strict=True)
    return [key for key, differs, count, i in rows if differs and (read[i] or not count)]


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)
