"""The adapter of one leaf from two checkpoints: the truncated decomposition of their difference."""

from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _jax, _paths, _svd
from jlora._adapters import Adapter, Fingerprint, fingerprint
from jlora._init import of_site, whole_of_site
from jlora._rules import Full, Rule
from jlora._sharding import shardings
from jlora._sites import Site, Sites
from jlora._text import shown


def pairs(params: Any, tuned: Any, sites: Sites) -> dict[str, tuple[Any, Any]]:
    """The leaves of both checkpoints by path."""
    (paths, base, _), (others, news, _) = _paths.flatten(params), _paths.flatten(tuned)
    difference = sites.base.difference(fingerprint(paths, base))
    if difference:
        raise ValueError(
            f"The sites were found for other parameters: {difference}.\n  Call jlora.sites again with these."
        )
    new = dict(zip(others, news, strict=True))
    old = dict(zip(paths, base, strict=True))
    alone = [path for path in {**old, **new} if (path in new) != (path in old)]
    if alone:
        path, where = alone[0], "tuned" if alone[0] in old else "params"
        near = _paths.nearest(path, others if where == "tuned" else paths)
        raise ValueError(
            f"The checkpoints have different leaves: there is no '{shown(path)}' in {where}.\n  nearest: {', '.join(near)}"
        )
    for path, w in old.items():
        if np.shape(w) != np.shape(new[path]):
            raise ValueError(
                f"The checkpoints have different shapes: '{shown(path)}' is {np.shape(w)} in params, {np.shape(new[path])} in tuned."
            )
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in (w, new[path])):
            raise ValueError(f"extract needs the values of both checkpoints.\n  got: only the shape of '{shown(path)}'")
    return {path: (w, new[path]) for path, w in old.items()}


def _both(w: Any, v: Any) -> tuple[Any, Any]:
    """Two leaves in one dtype that holds both: on the host if they are there, where fp64 is fp64."""
    if all(isinstance(x, np.ndarray) and x.dtype.kind in "biufc" for x in (w, v)):
        promote: Any = np.promote_types
    else:
        promote, w, v = _jax.promote, jnp.asarray(w), jnp.asarray(v)
        if jnp.issubdtype(w.dtype, jax.dtypes.prng_key) and w.dtype == v.dtype:
            w, v = jax.random.key_data(w), jax.random.key_data(v)
        if w.sharding != v.sharding:
            v = jax.device_put(v, w.sharding)
    dtype = promote(w.dtype, v.dtype)
    if jnp.issubdtype(dtype, jnp.inexact):
        dtype = promote(dtype, np.float32)
    return w.astype(dtype), v.astype(dtype)


def differ(w: Any, v: Any) -> bool:
    """Whether two leaves differ anywhere; NaN is the same as NaN."""
    w, v = _both(w, v)
    return not bool(((w == v) | ((w != w) & (v != v))).all())


def extract(w: Any, v: Any, rule: Rule, site: Site, base: Fingerprint) -> tuple[Adapter, float]:
    """The adapter of the difference of two leaves, and the share of its squared norm that is kept."""
    dtype = rule.dtype or _jax.promote(site.dtype, jnp.float32)
    if isinstance(rule, Full):
        return whole_of_site(jnp.array(v, dtype=dtype, copy=True), site, base), 1.0
    if rule.only and site.kinds != (rule.only,):
        raise ValueError(
            f"Two checkpoints differ in all uses of '{shown(site.path)}' ({site.kind}), and the rule is for {rule.only} only.\n"
            f"  Leave out only={rule.only!r}."
        )
    old, new = _both(w, v)
    with np.errstate(all="ignore"):  # what is not finite raises here
        moved = _svd.whole(jnp.asarray(new - old))
    if not bool(jnp.isfinite(moved).all()):
        raise ValueError(
            f"The difference of '{shown(site.path)}' is not finite: a checkpoint holds NaN, infinity or numbers too large."
        )
    batch, inputs, outputs = (tuple(site.shape[d] for d in ds) for ds in (site.batch, site.inputs, site.outputs))
    m = prod(inputs)
    svd = _svd.dense_svd(moved.transpose(*site.batch, *site.inputs, *site.outputs).reshape(*batch, m, -1), rule.rank)
    a, b = _svd.factors(svd, rule.rank, _svd.spare_norm(m, site.kind), rule.scale)
    a, b = a.reshape(*batch, *inputs, rule.rank), b.reshape(*batch, rule.rank, *outputs)
    made = of_site(a.astype(dtype), b.astype(dtype), site, rule.scale, rule.dropout, base)
    if _svd.is_split(w):
        made = jax.device_put(made, shardings({site.path: made}, {site.path: w.sharding})[site.path])
    return made, float(_svd.share(svd.s, rule.rank))
