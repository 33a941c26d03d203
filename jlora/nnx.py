"""Flax NNX: a module as a pure function of its parameters, and back.

``fn, params = jlora.nnx.split(module)`` gives what every function of jlora takes; ``jlora.nnx.merge(fn, params)`` gives a module again.
"""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from jlora import _paths
from jlora._adapters import Adapter
from jlora._nnx_changes import Key, changed, value_of
from jlora._text import shown


class Functional:
    """``fn(params, *args, **kwargs)``: calls a module that has ``params`` for its ``nnx.Param``s.

    The module's other state (batch statistics, random streams) is as it was when the module was split. A call that would change it
    raises, unless ``mutable=True``: then the call returns ``(output, state)``, and ``state=`` passes it to the next one. A random
    stream that is drawn from in vain does not count, and neither does state that goes through ``nnx.jit`` or ``nnx.remat`` unchanged.
    ``mutable=["batch_stats"]``, and whatever else is no flag, is handed on to the module, for ``nnx.bridge.ToNNX``.
    """

    def __init__(self, graph: Any, params: Any, state: Any, name: str):
        self._graph, self.state, self._name = graph, state, name
        self._keys = _keys(params)
        self._unknown = _shape_only(state)

    def __repr__(self) -> str:
        return f"jlora.nnx.Functional({self._name})"

    @property
    def __jlora_shapes__(self) -> dict[str, Any]:
        """What ``jlora.sites`` passes, which needs no values, if the module has none."""
        return {} if self._unknown is None else {"state": self.state}

    def __call__(
        self, params: Any, *args: Any, method: str = "__call__", mutable: Any = False, state: Any = None, **kwargs: Any
    ) -> Any:
        if state is None and self._unknown is not None:
            raise ValueError(
                f"The module was split without values (nnx.eval_shape): only the shape of '{self._unknown}' is known.\n"
                "  Split a module that has values, or pass its other state: fn(params, ..., state=state)."
            )
        state = self.state if state is None else self._known(state)
        mine = self._own(params)
        if not isinstance(mutable, bool):  # collections that may change, an argument of modules like nnx.bridge.ToNNX
            kwargs["mutable"] = mutable

        def run(mine: Any, state: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
            module = nnx.merge(self._graph, mine, state, copy=True)
            out = getattr(module, method)(*args, **kwargs)
            parts: Any = nnx.split(module, nnx.Param, ...)
            return out, parts[1], parts[2]

        given = (mine, state, args, kwargs)
        out, *after = run(*given)
        found = changed(run, given, after[:1] if mutable else after)
        if found:
            raise ValueError(_refusal(found[0]))
        return (out, after[1]) if mutable else out

    def _known(self, state: Any) -> Any:
        """``state`` without what a call created, as ``sow`` does: the module has no place for it."""
        flat = dict(nnx.to_flat_state(state))
        known = [keys for keys, _ in nnx.to_flat_state(self.state)]
        lacking = [keys for keys in known if keys not in flat]
        if lacking:
            raise ValueError(
                f"This is not the state of {self._name}: it lacks '{shown('/'.join(map(str, lacking[0])))}'.\n"
                "  Pass what a call with mutable=True returned, or fn.state."
            )
        return state if len(flat) == len(known) else nnx.from_flat_state([(keys, flat[keys]) for keys in known])

    def _own(self, params: Any) -> nnx.State:
        """The parameters under the module's own keys; nnx itself goes by their order, which that of other keys need not be."""
        if isinstance(params, Mapping) and any(isinstance(x, Adapter) for x in params.values()):
            raise TypeError(
                f"The parameters of {self._name} come first.\n  got: an adapter\n"
                "  Call jlora.wrap(fn)(params, lora, ...), or pass merged parameters: jlora.merge(params, lora)."
            )
        return nnx.State(_keyed(params, self._keys, self._name))


def split(module: nnx.Module) -> tuple[Functional, Any]:
    """Splits ``module`` into a pure function and its parameters, a plain nested dict whose keys are strings.

    The items of an ``nnx.List`` have the keys ``"0"``, ``"1"``, …, which orbax and ``jax.export`` keep as they are.

    Args:
        module: Any NNX module. For ``jlora.sites``, one of shapes will do, as ``nnx.eval_shape`` makes it.

    Returns:
        ``(fn, params)``: ``fn(params, *args, **kwargs)`` is what ``module(*args, **kwargs)`` is; ``method="name"`` calls another method.

    Raises:
        TypeError: ``module`` is no NNX module.
        ValueError: ``module`` is a linen module in an ``nnx.bridge.ToNNX`` that has no variables yet.

    Example:
        >>> import jax, jlora
        >>> from flax import nnx
        >>> fn, params = jlora.nnx.split(nnx.Linear(3, 5, rngs=nnx.Rngs(0)))
        >>> fn(params, jax.numpy.ones((2, 3))).shape
        (2, 5)
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(f"split takes an nnx.Module.\n  got: {type(module).__name__}")
    parts: Any = nnx.split(module, nnx.Param, ...)
    graph, params, state = parts
    if isinstance(module, nnx.bridge.ToNNX) and not params:
        raise ValueError(
            f"The linen module {type(module.to_nnx__module).__name__} has no parameters yet.\n"
            "  Make them with an example of its input: nnx.bridge.ToNNX(module, rngs=rngs).lazy_init(x)."
        )
    return Functional(graph, params, state, type(module).__name__), _named(params)


def merge(fn: Functional, params: Any, state: Any = None) -> nnx.Module:
    """A module again, with ``params`` for its parameters: the way back from ``split``.

    Args:
        fn: The function ``split`` returned.
        params: Its parameters, for example merged ones.
        state: The rest of the module's state, if a call with ``mutable=True`` returned another. What the call created is left out.

    Raises:
        TypeError: ``fn`` is no such function; ``params`` is an adapter.
        ValueError: ``params`` has other leaves than the module.
    """
    if not isinstance(fn, Functional):
        raise TypeError(f"merge takes the function that jlora.nnx.split returned.\n  got: {type(fn).__name__}")
    return nnx.merge(fn._graph, fn._own(params), fn.state if state is None else fn._known(state), copy=True)


def _keys(params: Any) -> Any:
    """The keys that the module has for its parameters: strings, and numbers where there is a list."""
    return {key: _keys(x) for key, x in params.items()} if isinstance(params, Mapping) else None


def _named(params: Any) -> Any:
    """The values under keys that are strings."""
    return {str(key): _named(x) for key, x in params.items()} if isinstance(params, Mapping) else value_of(params)


def _keyed(params: Any, keys: Any, name: str, at: tuple[str, ...] = ()) -> Any:
    """The values under the keys that the module has."""
    if keys is None:
        return params
    given = {str(key): x for key, x in params.items()} if isinstance(params, Mapping) else {}
    wanted = {str(key): key for key in keys}
    for what, these, those in (("lack", wanted, given), ("also have", given, wanted)):
        odd = next((key for key in these if key not in those), None)
        if odd is not None:
            where, *near = ("/".join((*at, key)) for key in (odd, *_paths.nearest(odd, those)))
            hint = f"\n  nearest: {', '.join(near)}" if near else ""
            raise ValueError(
                f"These are not the parameters of {name}: they {what} '{where}'.{hint}\n"
                "  Pass a tree like the one that jlora.nnx.split returned."
            )
    return {key: _keyed(given[word], keys[key], name, (*at, word)) for word, key in wanted.items()}


def _refusal(key: Key) -> str:
    """Why a call that changes a variable is refused."""
    if key.part == 0:
        return (
            f"The call writes the parameter '{key}', which a pure function of its parameters cannot.\n"
            "  Keep what a call changes in another kind of variable, such as nnx.Variable, and pass mutable=True."
        )
    linen = "give the linen module keys of your own: fn(params, ..., rngs=nnx.Rngs(dropout=key))"
    other = linen if "to_nnx__rngs" in key.path else "split the module in evaluation mode (module.eval())"
    return (
        f"The call changes '{key}', which a pure function cannot.\n"
        f"  Pass mutable=True and take (output, state), or {other}."
    )


def _shape_only(state: Any) -> str | None:
    """The first variable of which only the shape is known."""
    for keys, variable in nnx.to_flat_state(state):
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(value_of(variable))):
            return "/".join(map(str, keys))
    return None
