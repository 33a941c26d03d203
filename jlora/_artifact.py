"""An adapted function as an artifact that runs without jlora: ``jax.export`` with the adapter among its arguments."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._adapters import Adapter, FullWeight, LowRank
from jlora._text import check_text, shown
from jlora._wrap import check_lora, wrap

Arrays = dict[str, dict[str, jax.Array]]


def arrays(lora: Mapping[str, Adapter], *, rank: int | None = None) -> Arrays:
    r"""The adapter as plain dicts of arrays, for the artifact that ``function`` makes: scales are folded in, ranks padded with zeros.

    Args:
        lora: Adapters by path.
        rank: Of all factors; by default each keeps its own. Adapters of one artifact have the same paths and ranks.

    Returns:
        By path, ``{"a": (*batch, *inputs, rank), "b": (*batch, rank, *outputs)}`` with $\Delta W = A B$, or ``{"value": ...}``. Of an
        adapter for one kind of use the names say which: ``"a_lookup_only"``.

    Raises:
        ValueError: an adapter has a higher rank.
        TypeError: an adapter is neither ``LowRank`` nor ``FullWeight``.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, jlora.export
        >>> params = {"w": jnp.ones((3, 5))}
        >>> sites = jlora.sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 3)))
        >>> lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="w"))
        >>> {name: x.shape for name, x in jlora.export.arrays(lora, rank=4)["w"].items()}
        {'a': (3, 4), 'b': (4, 5)}
    """
    check_lora(lora)
    return {path: _plain(path, adapter, rank) for path, adapter in lora.items()}


def _only(adapter: Adapter) -> str:
    """What is added to the names of arrays that only one kind of use has: a program for another does not take them."""
    return f"_{adapter.only}_only" if isinstance(adapter, LowRank) and adapter.only else ""


def _plain(path: str, adapter: Adapter, rank: int | None) -> dict[str, jax.Array]:
    if isinstance(adapter, FullWeight):
        return {"value": adapter.value}
    if not isinstance(adapter, LowRank):
        raise TypeError(
            f"Only LowRank and FullWeight adapters have plain arrays.\n  got: {type(adapter).__name__} at '{shown(path)}'"
        )
    more = 0 if rank is None else rank - adapter.rank
    if more < 0:
        raise ValueError(
            f"'{shown(path)}' has rank {adapter.rank}, above {rank}.\n  Lower it with jlora.algebra.resize, or allow more."
        )
    n = len(adapter.batch)
    b = adapter.b * jnp.asarray(adapter.scale, adapter.b.dtype)
    pads = [
        [(0, more if d == axis else 0) for d in range(x.ndim)] for x, axis in ((adapter.a, adapter.a.ndim - 1), (b, n))
    ]
    return {f"a{_only(adapter)}": jnp.pad(adapter.a, pads[0]), f"b{_only(adapter)}": jnp.pad(b, pads[1])}


def function(
    fn: Callable[..., Any],
    params: Any,
    lora: Mapping[str, Adapter],
    *args: Any,
    rank: int | None = None,
    platforms: Sequence[str] | None = None,
    **kwargs: Any,
) -> Any:
    """Exports ``fn`` with adapted weights: one artifact for one base and any number of adapters.

    ``exported.serialize()`` gives bytes; a process that has JAX and flatbuffers, but neither jlora nor the model, calls
    ``jax.export.deserialize(bytes).call(params, arrays(lora), *args)``. A merged function needs no more than ``jax.export`` itself.

    Args:
        fn: As for ``jlora.wrap``.
        params: The base, or ``ShapeDtypeStruct``s of it: dicts with strings for keys, lists and tuples, which JAX can serialise.
        lora: An adapter, or ``ShapeDtypeStruct``s of one: those that are called later have its paths, shapes and ranks.
        *args: Arguments of one call; ``ShapeDtypeStruct``s may have symbolic sizes (``jax.export.symbolic_shape``).
        rank: Of all factors, as for ``arrays``.
        platforms: Such as ``["cpu", "tpu", "cuda"]``; by default the one at hand.
        **kwargs: Flags of the call; they are fixed in the artifact.

    Returns:
        A ``jax.export.Exported`` of ``(params, arrays(lora), *args)``.

    Raises:
        ImportError: flatbuffers is not installed, with which JAX serialises.
        ValueError: as ``jlora.wrap``'s ``apply`` does; a dict has a key that is no string.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, jlora.export
        >>> params, x = {"w": jnp.ones((3, 5))}, jnp.ones((2, 3))
        >>> fn = lambda p, x: x @ p["w"]
        >>> lora = jlora.init(jax.random.key(0), params, jlora.sites(fn, params, x), jlora.LoRA(rank=2, targets="w"))
        >>> artifact = jlora.export.function(fn, params, lora, x).serialize()
        >>> jax.export.deserialize(artifact).call(params, jlora.export.arrays(lora), x).shape
        (2, 5)
    """
    import jax.export  # here, so that `import jlora` stays quick

    check_lora(lora, params)
    _check_serialisable(params=params, args=args)
    apply = wrap(fn)
    shells = {path: _shell(adapter) for path, adapter in lora.items()}

    def call(params: Any, plain: Arrays, *args: Any) -> Any:
        return apply(params, {path: shells[path](**x) for path, x in plain.items()}, *args, **kwargs)

    plain = jax.eval_shape(lambda lora: arrays(lora, rank=rank), dict(lora))
    exported = jax.export.export(jax.jit(call), platforms=None if platforms is None else list(platforms))
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), lax.dtype(x)), params)
    return exported(base, plain, *args)


def _check_serialisable(**trees: Any) -> None:
    """Raises where JAX would, once the artifact is made: it says neither which key, nor what to install."""
    if importlib.util.find_spec("flatbuffers") is None:
        raise ImportError('flatbuffers is missing, with which JAX serialises.\n  pip install "jlora[peft]"')
    for name, tree in trees.items():
        for keys, _ in jax.tree_util.tree_flatten_with_path(tree)[0]:
            check_text(jax.tree_util.keystr(keys, simple=True, separator="/"))
            odd = next((k for k in keys if isinstance(k, jax.tree_util.DictKey) and not isinstance(k.key, str)), None)
            if odd is not None:
                where = jax.tree_util.keystr(keys, simple=True, separator="/")
                raise ValueError(
                    f"JAX serialises only dicts whose keys are strings.\n  got: {odd.key!r} in '{shown(where)}' of {name}\n"
                    "  Name them: {str(key): x for key, x in layers.items()}."
                )


def _shell(adapter: Adapter) -> Callable[..., Adapter]:
    """What makes the adapter again from its plain arrays."""
    static = {k: v for k, v in vars(adapter).items() if k not in adapter.labels}
    if isinstance(adapter, LowRank):
        static["scale"] = 1.0
    end = _only(adapter)
    return lambda **found: type(adapter)(**{name.removesuffix(end): x for name, x in found.items()}, **static)
