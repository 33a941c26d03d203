"""Fresh adapters for chosen sites."""

from collections.abc import Iterable
from functools import lru_cache
from hashlib import sha256
from math import prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import _hosts, _jax, _paths
from jlora._adapters import Adapter, FullWeight, LowRank, fingerprint
from jlora._rules import Full, LoRA, Rule, assign
from jlora._sharding import shardings
from jlora._sites import Site, Sites
from jlora._text import shown


def init(key: jax.Array, params: Any, sites: Sites, rules: Rule | Iterable[Rule]) -> dict[str, Adapter]:
    r"""Makes a fresh adapter: A random, B zero, so that it changes nothing yet.

    Each leaf's key is ``key`` folded with its path, so that adding a target never changes another's start.

    Args:
        key: A PRNG key.
        params: The base, or ``jax.ShapeDtypeStruct``s of it (``Full`` then has nothing to copy and raises).
        sites: What ``jlora.sites`` found for the same parameters.
        rules: One rule or several; the first that matches a leaf wins.

    Returns:
        A dict from path to adapter: ``LowRank`` with ``a: (*batch, *inputs, rank)`` and ``b: (*batch, rank, *outputs)``, or
        ``FullWeight``. If the base leaf is split over devices by a ``NamedSharding``, so are its factors.

    Raises:
        TypeError: arguments in another order.
        ValueError: ``sites`` belongs to other parameters; processes of one job ask for different adapters; see also ``LoRA`` and ``Full``.

    Example:
        >>> import jax, jax.numpy as jnp, jlora
        >>> def model(params, x):
        ...     return jnp.tanh(x @ params["up"]) @ params["down"]
        >>> params = {"up": jnp.ones((3, 5)), "down": jnp.ones((5, 2))}
        >>> found = jlora.sites(model, params, jnp.ones((7, 3)))
        >>> lora = jlora.init(jax.random.key(0), params, found, jlora.LoRA(rank=2))
        >>> {path: (adapter.a.shape, adapter.b.shape) for path, adapter in lora.items()}
        {'up': ((3, 2), (2, 5))}
    """
    if not isinstance(sites, Sites):
        raise TypeError(
            f"init takes (key, params, sites, rules), sites from jlora.sites.\n  got: {type(sites).__name__} as sites"
        )
    paths, leaves, _ = _paths.flatten(params)
    base = dict(zip(paths, leaves, strict=True))
    chosen: dict[str, tuple[Rule, Site]] = {}
    keys: list[jax.Array] = []

    def check() -> None:
        keys.append(as_key(key, "init takes (key, params, sites, rules), key from jax.random.key."))
        difference = sites.base.difference(fingerprint(paths, leaves))
        if difference:
            raise ValueError(
                f"The sites were found for other parameters: {difference}.\n  Call jlora.sites again with these."
            )
        chosen.update(assign(rules, sites))

    made: dict[str, Adapter] = {}

    def make() -> None:
        made.update((path, _make(keys[0], base[path], rule, site, sites)) for path, (rule, site) in chosen.items())

    if any(map(_hosts.spans, leaves)):
        # Before anything is made: processes that make different arrays would wait for each other for ever, or train nonsense.
        _hosts.together(check)
        wanted = [f"{path} {_spelled(*chosen[path])}" for path in sorted(chosen)]
        _hosts.agree("the adapter to make", [*wanted, *_hosts.pieces(jax.random.key_data(keys[0]))[:1]])
        _hosts.together(make)
    else:
        check()
        make()
    return made


def _spelled(rule: Rule, site: Site) -> str:
    """What makes an adapter; functions among it are not compared."""
    axes = f"{site.shape} {site.inputs} {site.outputs} {site.batch} {site.kind}"
    if not isinstance(rule, LoRA):
        return f"{axes} full {rule.dtype}"
    start = rule.init_a if isinstance(rule.init_a, str) else "function"
    return f"{axes} {rule.rank} {rule.scale} {rule.dropout} {rule.dtype} {start} {rule.only}"


def as_key(key: Any, otherwise: str) -> jax.Array:
    """``key`` as a typed key; legacy ``uint32`` keys are wrapped."""
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.ndim == 0:
        return key
    if dtype == jnp.uint32 and np.shape(key)[-1:] in ((2,), (4,)) and np.ndim(key) == 1:
        return jax.random.wrap_key_data(key)
    raise TypeError(f"{otherwise}\n  got: {type(key).__name__} {getattr(key, 'shape', '')} as the key")


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """``key`` folded with ``path``, by 64 bits of its hash."""
    digest = sha256(path.encode("utf-8", "surrogatepass")).digest()
    for i in (0, 4):
        key = jax.random.fold_in(key, int.from_bytes(digest[i : i + 4], "little"))
    return key


def _make(key: jax.Array, leaf: Any, rule: Rule, site: Site, sites: Sites) -> Adapter:
    dtype = rule.dtype or _jax.promote(site.dtype, jnp.float32)
    if isinstance(rule, Full):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            raise ValueError(
                f"Full needs the values of '{shown(site.path)}' to start from.\n  got: only its shape and dtype"
            )
        return whole_of_site(jnp.array(leaf, dtype=dtype, copy=True), site, sites.base)
    sizes = [tuple(site.shape[d] for d in group) for group in (site.batch, site.inputs, site.outputs)]
    batch, inputs, outputs = sizes
    shapes = {"a": (*batch, *inputs, rule.rank), "b": (*batch, rule.rank, *outputs)}

    def adapter(a: Any, b: Any) -> LowRank:
        return of_site(a, b, site, rule.scale, rule.dropout, sites.base, rule.only)

    where = _born(leaf, adapter(*(jax.ShapeDtypeStruct(shape, dtype) for shape in shapes.values())), site.path)
    # What meets the activations is random, the other zero: B and A where only products are adapted that sum over the table's outputs.
    first, second = ("b", "a") if _sums_over_outputs(site, rule.only) else ("a", "b")
    fan_in = 1 if (rule.only or site.kind) == "lookup" else prod(inputs if first == "a" else outputs)
    filled = _fill_a(fold_path(key, site.path), rule, shapes[first], dtype, fan_in, where[first])
    zeros = _random(key, "zeros", shapes[second], dtype, fan_in, where[second])
    return adapter(**{first: filled, second: zeros})


def _sums_over_outputs(site: Site, only: str | None) -> bool:
    """Whether all uses of the one kind that is adapted sum over what lookups, which name the axes, leave."""
    summed = [set(use.inputs) - set(site.batch) for use in site.uses if use.kind == only]
    return bool(summed) and all(axes and axes <= set(site.outputs) for axes in summed)


def of_site(a: Any, b: Any, site: Site, scale: float, dropout: float, base: Any, only: str | None = None) -> LowRank:
    """The adapter of a site from its factors, for ``only`` one kind of its uses if there are others."""
    axes = (site.inputs, site.outputs, site.batch)
    some = only if only and site.kinds != (only,) else ""
    return LowRank(a, b, *axes, scale, dropout, base, site.kind, site.window, site.groups, site.dilated, some)


def whole_of_site(value: Any, site: Site, base: Any) -> FullWeight:
    """The adapter of a site that is trained outright."""
    axes = ((), (), ()) if site.is_plain else (site.inputs, site.outputs, site.batch)
    return FullWeight(value, base, site.kind, *axes, site.window, site.groups)


def _born(leaf: Any, shell: LowRank, path: str) -> dict[str, Any]:
    """Where the factors go: as the leaf's sharding implies if it is split over a mesh, else where JAX puts them."""
    inside = isinstance(leaf, jax.core.Tracer)
    sharding = jax.typeof(leaf).sharding if inside else getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding) or (inside and not _jax.is_explicit(leaf)):
        return {"a": None, "b": None}
    return shardings({path: shell}, {path: sharding})[path].arrays()


def _fill_a(key: jax.Array, rule: LoRA, shape: tuple[int, ...], dtype: Any, fan_in: int, sharding: Any) -> jax.Array:
    if not callable(rule.init_a):
        return _random(key, rule.init_a, shape, dtype, fan_in, sharding)
    a = jnp.asarray(rule.init_a(key, shape, dtype))
    if a.shape != shape or not jnp.issubdtype(a.dtype, jnp.inexact):
        raise ValueError(f"init_a must return floats of shape {shape}.\n  got: {a.dtype} of shape {a.shape}")
    return a.astype(dtype) if sharding is None else _jax.place(a.astype(dtype), sharding)


def _random(key: jax.Array, kind: str, shape: tuple[int, ...], dtype: Any, fan_in: int, sharding: Any) -> jax.Array:
    return _maker(kind, shape, dtype, fan_in, sharding)(key)


@lru_cache(maxsize=1024)
def _maker(kind: str, shape: tuple[int, ...], dtype: Any, fan_in: int, sharding: Any) -> Any:
    """What makes a factor out of a key, each device its own part of it."""
    bound, where = 1.0 / sqrt(fan_in), _jax.explicit_part(sharding)

    def make(key: jax.Array) -> jax.Array:
        if kind == "zeros":
            return lax.broadcast(jnp.zeros((), dtype), shape, out_sharding=where)
        if kind == "normal":
            return bound * jax.random.normal(key, shape, dtype, out_sharding=where)
        real = jnp.finfo(dtype).dtype
        return jax.random.uniform(key, shape, real, -bound, bound, out_sharding=where).astype(dtype)

    # Inside jit a sharding is part of a type, and has no devices.
    known = sharding is not None and isinstance(sharding.mesh, jax.sharding.Mesh)
    return jax.jit(make, out_shardings=sharding) if known else jax.jit(make)
