r"""The algebra of trained adapters: make one of two checkpoints, change its rank, add several, measure and compare them.

``import jlora.algebra``. Everything works on dicts from path to ``LowRank`` or ``FullWeight``, per batch slice (a layer of a scan, an
expert), in fp32 or wider, and gives the factors' dtypes back. An update is never formed densely, except by ``extract``, by the methods
``"ties"`` and ``"dare"`` of ``combine`` and for leaves trained outright, one leaf at a time. Functions are pure; what needs no value to
choose a shape runs under ``jax.jit``.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jlora import _combine, _compare, _extract, _paths, _resize, _svd
from jlora._adapters import Adapter, FullWeight, LowRank
from jlora._algebra_checks import METHODS as METHODS
from jlora._algebra_checks import check, check_method, check_share, several, values_of
from jlora._compare import Comparison as Comparison
from jlora._rules import Rule, assign
from jlora._sites import Sites
from jlora._text import counted

Lora = Mapping[str, Adapter]


def extract(
    params: Any,
    tuned: Any,
    sites: Sites,
    rules: Rule | Iterable[Rule],
    *,
    rest: Literal["error", "ignore"] = "error",
    report: bool = False,
) -> Any:
    r"""The adapter that comes closest to what full fine-tuning did: the difference of two checkpoints, truncated.

    Of every slice of a leaf $s\,A B = U_r \Sigma_r V_r^*$, the first $r$ terms of the decomposition of
    $W_\mathrm{tuned} - W = U \Sigma V^*$, than which no matrix of rank $r$ is closer. $\sqrt{\Sigma_r / s}$ goes into each factor. A
    direction that the difference does not have gets a column in $A$ and zeros in $B$, so that it can still be trained.

    Args:
        params: The base.
        tuned: The fine-tuned checkpoint: the same paths and shapes. Of both, NumPy arrays will do; one leaf is decomposed at a time.
        sites: What ``jlora.sites`` found for ``params``.
        rules: As for ``jlora.init``; ``init_a`` is not used. A leaf of a ``Full`` rule is copied from ``tuned``.
        rest: What to do with leaves that differ and that no rule covers: raise, or ``"ignore"`` them.
        report: Also return what of the difference was kept.

    Returns:
        A dict from path to adapter. With ``report``, also a dict from path to the share of the squared Frobenius norm of the difference
        that the adapter keeps, over all slices (1 for a leaf trained outright or without a difference).

    Raises:
        TypeError: ``sites`` is none.
        ValueError: the trees do not match; leaves that differ are not covered; nothing that is covered differs; a difference is not
            finite; see also ``LoRA`` and ``Full``.

    Example:
        >>> import jax.numpy as jnp, jlora, jlora.algebra
        >>> def model(params, x):
        ...     return x @ params["w"]
        >>> params = {"w": jnp.zeros((3, 4))}
        >>> tuned = {"w": jnp.outer(jnp.arange(3.0), jnp.ones(4))}
        >>> found = jlora.sites(model, params, jnp.ones((2, 3)))
        >>> lora, kept = jlora.algebra.extract(params, tuned, found, jlora.LoRA(rank=1, targets="w"), report=True)
        >>> bool(jnp.allclose(lora["w"].delta(), tuned["w"], atol=1e-5)), round(kept["w"], 5)
        (True, 1.0)

    References:
        Eckart & Young, 1936, doi:10.1007/BF02288367.
    """
    if rest not in ("error", "ignore"):
        raise ValueError(f"rest must be 'error' or 'ignore'.\n  got: {rest!r}")
    if not isinstance(sites, Sites):
        raise TypeError(
            f"extract takes (params, tuned, sites, rules), sites from jlora.sites.\n  got: {type(sites).__name__} as sites"
        )
    pairs = _extract.pairs(params, tuned, sites)
    chosen = assign(rules, sites)
    changed = {path for path, (w, v) in pairs.items() if _extract.differ(w, v)}
    uncovered = [path for path in pairs if path in changed and path not in chosen]
    if uncovered and rest == "error":
        raise ValueError(
            f"No rule covers {counted(len(uncovered), 'leaf')} that changed: {_paths.listing(uncovered)}.\n"
            "  Add a rule for them (Full takes any leaf), or leave them out with rest='ignore'."
        )
    if not changed & set(chosen):
        where = f"in the leaves that rules cover: {_paths.listing(list(chosen))}" if changed else "in all leaves"
        raise ValueError(f"The two checkpoints are the same {where}.\n  The adapter would have no effect.")
    lora, kept = {}, {}
    for path, (rule, site) in chosen.items():
        lora[path], kept[path] = _extract.extract(*pairs[path], rule, site, sites.base)
    return (lora, kept) if report else lora


def resize(
    lora: Lora, rank: int | Mapping[str, int] | None = None, *, energy: float | None = None, report: bool = False
) -> Any:
    r"""The same updates with another rank: the closest ones of a lower rank, or the very same with room to train of a higher.

    With $A = Q_a R_a$ and $B^* = Q_b R_b$, the decomposition of the small $R_a R_b^*$ is that of $A B$, which is never formed.
    ``scale`` stays as it is, and a leaf whose rank does not change is returned as it is. A direction that is new, or that the update does
    not have, gets a column in ``a`` as a fresh adapter has it and zeros in ``b``.

    Args:
        lora: Adapters by path; leaves trained outright are returned as they are.
        rank: The new rank, or a dict from patterns of whole paths to ranks: the first that matches a leaf wins, others stay.
        energy: Instead of ``rank``, the share of the squared norm of each leaf's update to keep (over all its slices, which have one rank
            in common), by the lowest rank that does. Chooses shapes from values, so not under ``jit``.
        report: Also return what was kept.

    Returns:
        A dict from path to adapter. With ``report``, also a dict from path to the share of the squared norm of the update that was kept.

    Raises:
        TypeError: ``lora`` is no adapter, or holds a kind of one's own.
        ValueError: not one of ``rank`` and ``energy``, or out of range; a rank above the smaller side; a pattern without effect; ``energy``
            under ``jit`` or of values that are not finite.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, jlora.algebra
        >>> params = {"w": jnp.ones((5, 7))}
        >>> found = jlora.sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 5)))
        >>> lora = jlora.init(jax.random.key(0), params, found, jlora.LoRA(rank=4, targets="w"))
        >>> smaller = jlora.algebra.resize(lora, 2)
        >>> smaller["w"].a.shape, smaller["w"].b.shape
        ((5, 2), (2, 7))
    """
    check(lora)
    low = {path: x for path, x in lora.items() if isinstance(x, LowRank)}
    if not low:
        raise ValueError("Every leaf of the adapter is trained outright: resize would have no effect.")
    if (rank is None) == (energy is None):
        raise ValueError(f"resize takes either rank or energy.\n  got: rank={rank!r}, energy={energy!r}")
    if energy is not None:
        check_share("energy", energy)
        ranks = {path: _resize.rank_of(path, x, energy) for path, x in low.items()}
    else:
        ranks = _resize.ranks_of(low, rank)
    out, kept = dict(lora), {path: jnp.float32(1.0) for path in lora}
    for path, new in ranks.items():
        out[path], kept[path] = _resize.resize(path, low[path], new)
    return (out, kept) if report else out


def combine(
    loras: Sequence[Lora],
    weights: Sequence[Any] | None = None,
    *,
    method: Literal["concat", "svd", "ties", "dare"] = "concat",
    rank: int | None = None,
    density: float | None = None,
    key: Any = None,
    params: Any = None,
) -> dict[str, Adapter]:
    r"""One adapter from several of the same base: the weighted sum of their updates, $\sum_i w_i\, s_i A_i B_i$, or one of its variants.

    A leaf that only some of them have is combined from those. The result keeps their ``scale`` if it is the same, else has 1 and the
    scales in ``b``; what else is not an array is as in the first.

    Of leaves trained outright the sum is $W + \sum_i w_i (W_i - W) = (1 - \sum_i w_i) W + \sum_i w_i W_i$: where their weights sum to 1,
    the base is not needed.

    Args:
        loras: Adapters of one base. Those of ``jlora.peft.read``, which know only the leaves that they adapt, may be for different ones.
        weights: One number for each; 1 if not given. A negative one subtracts.
        method: ``"concat"`` puts the factors side by side: exact, and the ranks add up. ``"svd"`` then truncates to ``rank``, without a
            dense update. ``"ties"`` keeps the entries of each weighted update that are largest, elects a sign for each entry by their sum,
            and averages those that have it; ``"dare"`` drops entries of each at random, scales up the others, and adds. Both form the
            update of one leaf at a time, and truncate to ``rank``.
        rank: For all methods but ``"concat"``; by default the highest among the adapters (or the smaller side, if that is lower).
        density: For ``"ties"`` and ``"dare"``: the share of entries of each update to keep, leaf by leaf.
        key: For ``"dare"``, a PRNG key.
        params: The base, needed if a leaf is trained outright and the weights there do not sum to 1, or ``"ties"`` or ``"dare"`` need
            the updates. The result is trained outright too.

    Returns:
        A dict from path to adapter.

    Raises:
        TypeError: ``loras`` is not a sequence of adapters, a kind is of one's own, or ``key`` is no key.
        ValueError: the adapters belong to different bases, or split a leaf differently; a number is out of range or without use for the
            method; a leaf is trained outright and ``params`` is not given.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, jlora.algebra
        >>> params = {"w": jnp.ones((5, 7))}
        >>> found = jlora.sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 5)))
        >>> one, two = (
        ...     jlora.init(jax.random.key(i), params, found, jlora.LoRA(rank=2 + i, targets="w")) for i in (0, 1)
        ... )
        >>> jlora.algebra.combine([one, two], [0.5, -1.0])["w"].rank
        5
        >>> jlora.algebra.combine([one, two], [0.5, -1.0], method="svd")["w"].rank
        3

    References:
        Yadav et al., 2023, arXiv:2306.01708 (ties); Yu et al., 2023, arXiv:2311.03099 (dare).
    """
    loras, weights = several(loras, weights)
    key = check_method(method, rank, density, key)
    paths = list(dict.fromkeys(path for lora in loras for path in lora))
    found = {path: [(w, lora[path]) for w, lora in zip(weights, loras, strict=True) if path in lora] for path in paths}
    wanting = {path for path in paths if _combine.needs_base(found[path], dense=method in ("ties", "dare"))}
    lacking = [{path: x for path, x in lora.items() if path in wanting} for lora in loras]
    base = values_of(lacking, params, "combine(loras, params=params)")
    out: dict[str, Adapter] = {}
    for path, terms in found.items():
        at = [i for i, lora in enumerate(loras) if path in lora]
        mix = _combine.mixer(path, at, method, density, key)
        if any(isinstance(x, FullWeight) for _, x in terms):
            out[path] = _combine.combine_full(terms, base.get(path), mix)
        elif method == "concat":
            out[path] = _combine.concat(terms)
        else:
            out[path] = _combine.combine_low(path, terms, rank, mix)
    return out


def spectrum(lora: Lora) -> dict[str, jax.Array]:
    """The singular values of each update ``scale * a @ b``, from its factors.

    Args:
        lora: Adapters by path. Leaves trained outright are left out: they have no factors.

    Returns:
        A dict from path to values, descending, shape ``(*batch, rank)``; as many as the smaller side has, if that is lower. All are zero
        for an adapter that is fresh.

    Raises:
        TypeError: ``lora`` is no adapter, or holds a kind of one's own.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, jlora.algebra
        >>> params = {"w": jnp.ones((5, 7))}
        >>> found = jlora.sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 5)))
        >>> lora = jlora.init(jax.random.key(0), params, found, jlora.LoRA(rank=3, targets="w"))
        >>> jlora.algebra.spectrum(lora)["w"]
        Array([0., 0., 0.], dtype=float32)
    """
    check(lora)
    low = {path: _svd.matrices(x, scaled=True) for path, x in lora.items() if isinstance(x, LowRank)}
    return {path: _svd.singular_values(a, b) for path, (a, b) in low.items()}


def effective_rank(values: jax.Array) -> jax.Array:
    r"""How many directions a spectrum uses, as a real number: $\exp(-\sum_i p_i \log p_i)$, $p_i = \sigma_i / \sum_j \sigma_j$.

    Args:
        values: Singular values, shape ``(*batch, n)``, as ``spectrum`` gives for one leaf.

    Returns:
        Shape ``(*batch,)``: between 1, for a single direction, and ``n``; 0 where all values are zero.

    Example:
        >>> import jax.numpy as jnp, jlora.algebra
        >>> jlora.algebra.effective_rank(jnp.array([[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])).round(3).tolist()
        [2.0, 0.0]

    References:
        Roy & Vetterli, 2007, "The effective rank: a measure of effective dimensionality", EUSIPCO.
    """
    total = jnp.sum(values, axis=-1, keepdims=True)
    p = values / jnp.where(total > 0, total, jnp.ones_like(total))
    entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, jnp.ones_like(p))), axis=-1)
    return jnp.where(total[..., 0] == 0, jnp.zeros_like(entropy), jnp.exp(entropy))  # NaN stays NaN


def norms(lora: Lora, params: Any = None) -> dict[str, jax.Array]:
    """The Frobenius norm of each update, from its factors.

    Args:
        lora: Adapters by path.
        params: The base; needed only where a leaf is trained outright, whose update is its value less the base's.

    Returns:
        A dict from path to norms, shape ``(*batch,)``: one for each slice.

    Raises:
        TypeError: ``lora`` is no adapter, or holds a kind of one's own.
        ValueError: a leaf is trained outright and ``params`` is not given, or ``params`` is another base.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, jlora.algebra
        >>> params = {"w": jnp.ones((5, 7))}
        >>> found = jlora.sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 5)))
        >>> lora = jlora.init(jax.random.key(0), params, found, jlora.LoRA(rank=3, targets="w"))
        >>> float(jlora.algebra.norms(lora)["w"])
        0.0
    """
    check(lora)
    base = values_of([lora], params, "norms(lora, params)")
    return {path: _compare.norm_of(x, base.get(path)) for path, x in lora.items()}


def compare(one: Lora, two: Lora, params: Any = None) -> dict[str, Comparison]:
    r"""How two adapters of one base relate, leaf by leaf, from their factors.

    Args:
        one: Adapters by path.
        two: Adapters by path, of the same base.
        params: The base; needed only where a leaf is trained outright.

    Returns:
        A dict from path to ``Comparison``, for the leaves of either. Every field has the shape ``(*batch,)``, but for angles:

        * ``norm_one``, ``norm_two``: Frobenius norms of the updates; ``None`` where the adapter lacks the leaf, and then so are all others.
        * ``cosine``: of the updates as vectors; 0 where one of them is zero.
        * ``difference``: $\lVert \Delta_1 - \Delta_2 \rVert / \lVert \Delta_1 \rVert$; where the first update is zero, 0 if the other is
          too, else infinite.
        * ``input_angles``, ``output_angles``: the principal angles, in radians, ascending, of the spaces that the updates read from and
          write to (the columns and the rows of $A B$); shape ``(*batch, n)``, ``n`` being the lower of the ranks. A direction that an
          update does not have, as of factors padded with zeros, makes no angle: beyond the lower number of directions that the updates
          have, angles are NaN; all are if one of them is a fresh adapter. ``None`` where a leaf is trained outright.

    Raises:
        TypeError: an argument is no adapter, or holds a kind of one's own.
        ValueError: the adapters belong to different bases, or split a leaf differently; a leaf is trained outright and ``params`` is not
            given.

    Example:
        >>> import jax, jax.numpy as jnp, jlora, jlora.algebra
        >>> params = {"w": jnp.ones((5, 7))}
        >>> found = jlora.sites(lambda p, x: x @ p["w"], params, jnp.ones((2, 5)))
        >>> lora = jlora.init(jax.random.key(0), params, found, jlora.LoRA(rank=3, targets="w"))
        >>> one = jax.tree.map(lambda x: x + 1.0, lora)
        >>> two = jlora.algebra.combine([one], [-2.0])
        >>> found = jlora.algebra.compare(one, two)["w"]
        >>> round(float(found.cosine), 3), round(float(found.difference), 3)
        (-1.0, 3.0)

    References:
        Björck & Golub, 1973, "Numerical methods for computing angles between linear subspaces".
    """
    (one, two), _ = several([one, two], None)
    base = values_of([one, two], params, "compare(one, two, params)")
    return {path: _compare.compare(one.get(path), two.get(path), base.get(path)) for path in {**one, **two}}
