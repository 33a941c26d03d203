"""The public transform: a function of parameters becomes a function of parameters and adapters."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _jax, _paths
from jlora._adapters import Adapter
from jlora._derivatives import jlora_stop_gradient, refuse_derivatives
from jlora._factored import Branch
from jlora._init import as_key, fold_path
from jlora._interpret import Interpreter
from jlora._sites import RETURNED
from jlora._text import shown
from jlora._trace import Call, check_function, trace_call

_UNSAID: Any = object()  # no ``dropout_key``, not even ``None``


def wrap(
    fn: Callable[..., Any], *, dense: Literal["error", "allow"] = "error", train_base: bool = False
) -> Callable[..., Any]:
    r"""Returns ``apply(params, lora, *args, dropout_key=None, **kwargs)``: ``fn`` with adapted weights, kept factored.

    ``apply`` gives what ``fn(merge(params, lora), *args, **kwargs)`` gives, up to rounding. It traces ``fn``, and evaluates the same
    program with every adapted weight as $x W + s\,(x A) B$; the update $A B$ is never formed, neither forward nor backward. It is
    pure: ``jit`` it, differentiate it, ``vmap`` it.

    Args:
        fn: Any JAX function whose first argument is a tree of parameters.
        dense: What to do where an operation needs an adapted weight whole: ``"error"`` raises, naming the leaf, the operation and
            the line of the model; ``"allow"`` forms ``W + s A B`` there, with a gradient of full size and without dropout.
        train_base: Let gradients reach ``params``. Without it they are stopped, so that a gradient taken of the whole tree by mistake
            costs nothing.

    Returns:
        ``apply``. Arrays among its arguments are traced; flags, strings and Python numbers stay as they are. ``dropout_key``, a PRNG
        key, turns on dropout on the adapter branches whose rule has a rate; ``None`` turns it off, and so does leaving it out, except
        where such an adapter is differentiated: that must say which of the two it is.

    Raises:
        TypeError: ``fn`` is not callable; ``apply`` got its arguments in another order.
        ValueError: in ``apply``: an adapter belongs to another base, or none has an effect; an adapter with dropout is differentiated and
            ``dropout_key`` was left out.
        DenseWeightError: in ``apply``: see ``dense``.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> def model(params, x):
        ...     return jnp.tanh(x @ params["up"]) @ params["down"]
        >>> params = {"up": jnp.ones((3, 5)), "down": jnp.ones((5, 2))}
        >>> x = jnp.ones((7, 3))
        >>> lora = jlora.init(jax.random.key(0), params, jlora.sites(model, params, x), jlora.LoRA(rank=2))
        >>> apply = jax.jit(jlora.wrap(model))
        >>> bool((apply(params, lora, x) == jax.jit(model)(params, x)).all())
        True
    """
    check_function(fn, "wrap(fn)")
    if dense not in ("error", "allow"):
        raise ValueError(f"dense must be 'error' or 'allow'.\n  got: {dense!r}")

    if _takes(fn, "dropout_key"):
        raise ValueError(
            "The function has an argument 'dropout_key' of its own, which apply keeps for dropout of the adapter.\n"
            "  Wrap a function that calls it by another name: wrap(lambda p, x, key: fn(p, x, dropout_key=key))."
        )

    @functools.wraps(fn, updated=())
    def apply(
        params: Any, lora: Mapping[str, Adapter], /, *args: Any, dropout_key: Any = _UNSAID, **kwargs: Any
    ) -> Any:
        check_lora(lora, params)
        flat = _paths.flatten(params)
        check_base(lora, *flat[:2])
        if dropout_key is not None and dropout_key is not _UNSAID:
            dropout_key = as_key(dropout_key, "dropout_key must be one PRNG key.")
        call = trace_call(fn, flat, args, kwargs)
        read = _read(call)
        _check_effect(lora, call.paths, read)
        leaves = call.leaves if train_base else _freeze(call.leaves, read)
        if dropout_key is _UNSAID:
            lora, dropout_key = _ask_for_a_key(lora), None
        entered = [
            _enter(lora[path], leaf, path, dropout_key) if path in lora else leaf
            for path, leaf in zip(call.paths, leaves, strict=True)
        ]
        interpreter = Interpreter(call.data, call.plain, allow_dense=dense == "allow")
        outs = interpreter.run(call.program, [*entered, *call.arrays])
        outs = [interpreter.dense(out, RETURNED) for out in outs]
        _check_uses(lora, [path for path, used in zip(call.paths, read, strict=True) if used], interpreter.affected)
        return jax.tree_util.tree_unflatten(call.out_tree, outs)

    # The signature and documentation of fn no longer hold: apply takes the adapter second.
    del apply.__wrapped__
    apply.__doc__ = (
        "``fn`` with adapted weights: ``apply(params, lora, *args, dropout_key=None, **kwargs)``; see ``jlora.wrap``."
    )
    return apply


def _takes(fn: Callable[..., Any], name: str) -> bool:
    try:
        return name in inspect.signature(fn).parameters
    except (TypeError, ValueError):  # a builtin, which has no signature
        return False


def check_lora(lora: Any, params: Any = None, *, name: str = "lora") -> None:
    """Raises unless the argument ``name`` is a non-empty dict from path to adapter; looks whether ``params`` is one instead."""
    if isinstance(lora, Mapping) and lora and all(isinstance(x, Adapter) for x in lora.values()):
        return
    swapped = isinstance(params, Mapping) and params and all(isinstance(x, Adapter) for x in params.values())
    if swapped:
        raise TypeError(
            "The parameters come first, then the adapter: (params, lora, ...).\n  got: an adapter as params"
        )
    if isinstance(lora, Mapping) and not lora:
        raise ValueError(
            "The adapter is empty: it would have no effect.\n  Call the function itself, or make an adapter with jlora.init."
        )
    raise TypeError(
        f"{name} must be a dict from path to adapter, from jlora.init or jlora.load.\n  got: {_described(lora)}"
    )


def _described(given: Any) -> str:
    """What was given in place of an adapter: parameters, if it is a tree with arrays and no adapter among its leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(given, is_leaf=lambda x: isinstance(x, Adapter))
    arrays = [(keys, x) for keys, x in leaves if keys and hasattr(x, "shape") and not isinstance(x, Adapter)]
    if not arrays or any(isinstance(x, Adapter) for _, x in leaves):
        return type(given).__name__
    path = jax.tree_util.keystr(arrays[0][0], simple=True, separator="/")
    return f"parameters, {type(given).__name__} with the array '{shown(path)}' {arrays[0][1].shape}"


def check_base(lora: Mapping[str, Adapter], paths: list[str], leaves: list[Any]) -> None:
    """Raises unless every adapted leaf is there, with the shape it was adapted for."""
    shapes = {path: np.shape(leaf) for path, leaf in zip(paths, leaves, strict=True)}
    for path, adapter in lora.items():
        if path not in shapes:
            raise ValueError(
                f"The adapter belongs to another base: there is no leaf '{shown(path)}'.\n  nearest: "
                f"{', '.join(_paths.nearest(path, shapes))}"
            )
        if shapes[path] != adapter.shape:
            raise ValueError(
                f"The adapter belongs to another base: '{shown(path)}' has shape {shapes[path]}, the adapter is for {adapter.shape}."
            )


def _read(call: Call) -> list[bool]:
    """Which leaves the call reads. Some may be unread: a model has several methods."""
    jaxpr = call.program.jaxpr
    atoms = [*(v for eqn in jaxpr.eqns for v in eqn.invars), *jaxpr.outvars]
    read = {v for v in atoms if not _jax.is_literal(v)}
    return [v in read for v in jaxpr.invars[: len(call.leaves)]]


def _check_effect(lora: Mapping[str, Adapter], paths: list[str], read: list[bool]) -> None:
    """Raises if a call reads none of the adapted leaves."""
    if not any(path in lora and used for path, used in zip(paths, read, strict=True)):
        raise ValueError(f"The adapter would have no effect: this call uses none of {_paths.listing(list(lora))}.")


def _check_uses(lora: Mapping[str, Adapter], read: list[str], affected: set[str]) -> None:
    """Raises if all adapters of the leaves that a call reads are for kinds of uses that it has not."""
    mine = {path: getattr(lora[path], "only", "") for path in read if path in lora}
    if all(only and path not in affected for path, only in mine.items()):
        path, only = next(iter(mine.items()))
        raise ValueError(
            f"The adapter would have no effect: that of '{shown(path)}' is for one kind of use, {only}, and this call has none.\n"
            "  Call the function that has it, or the plain one; LoRA(only=None) adapts all uses."
        )


def _enter(adapter: Adapter, leaf: Any, path: str, dropout_key: Any) -> Any:
    key = None if dropout_key is None else fold_path(dropout_key, path)
    return adapter.enter(jnp.asarray(leaf), Branch(path, getattr(adapter, "dropout", 0.0)), key)


def _freeze(leaves: list[Any], read: list[bool]) -> list[Any]:
    """Stops gradients of the leaves that are read. Only a tracer of floats can be differentiated."""
    stop = [i for i, x in enumerate(leaves) if read[i] and isinstance(x, jax.core.Tracer) and _is_inexact(x)]
    if not stop:
        return leaves
    stopped = dict(zip(stop, jlora_stop_gradient([leaves[i] for i in stop]), strict=True))
    return [stopped.get(i, x) for i, x in enumerate(leaves)]


def _is_inexact(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _ask_for_a_key(lora: Mapping[str, Adapter]) -> Mapping[str, Adapter]:
    """The adapters, which raise where they are differentiated if one has dropout: nobody said whether it is on."""
    rates = {path: rate for path, adapter in lora.items() if (rate := getattr(adapter, "dropout", 0.0))}
    leaves, tree = jax.tree.flatten({path: lora[path] for path in rates})
    if not any(isinstance(x, jax.core.Tracer) for x in leaves):
        return lora

    def error() -> ValueError:
        path, rate = next(iter(rates.items()))
        more = f", and {len(rates) - 1} more" if len(rates) > 1 else ""
        return ValueError(
            f"The adapter has dropout (rate {rate} at '{shown(path)}'{more}), and apply is differentiated without a key for it.\n"
            "  To train with dropout, pass a new key at each step: apply(params, lora, ..., dropout_key=key).\n"
            "  To differentiate without dropout, say so: apply(params, lora, ..., dropout_key=None)."
        )

    return {**lora, **jax.tree.unflatten(tree, refuse_derivatives(leaves, error))}
