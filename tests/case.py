"""What a row of the table of cases is. The rows are in ``cases``, ``cases_joined`` and ``cases_constant``.

Sizes are distinct primes, so that a shape names its axes. A row's ``expect`` gives, for each path that can be adapted, its input,
output and batch axes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora

B, T, D, M, H, K, E, L, V = 2, 3, 11, 13, 5, 7, 17, 4, 19
Roles = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
MATRIX: Roles = ((0,), (1,), ())


@dataclass(frozen=True)
class Case:
    """One function of a parameter tree, its parameters and arguments, and what discovery should find."""

    name: str
    fn: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    expect: dict[str, Roles]
    kwargs: dict[str, Any] = field(default_factory=dict)
    rank: int = 2
    tol: float = 1e-5
    exact_in_jit: bool = True  # XLA rewrites the arithmetic around the product
    vmap: bool = True  # JAX has a batching rule for everything in it; it has none for ragged_dot

    def sites(self) -> jlora.Sites:
        return jlora.sites(self.fn, self.params, *self.args, **self.kwargs)

    def fresh(self) -> dict[str, Any]:
        rule = jlora.LoRA(rank=self.rank, alpha=3.0, targets=list(self.expect))
        return jlora.init(jax.random.key(3), self.params, self.sites(), rule)

    def trained(self, seed: int = 5) -> dict[str, Any]:
        """An adapter that changes something: every factor random, the update about as large as the base."""
        lora = self.fresh()
        leaves, tree = jax.tree.flatten(lora)
        return jax.tree.unflatten(tree, [array(*x.shape, seed=seed + i, dtype=x.dtype) for i, x in enumerate(leaves)])


def array(*shape: int, seed: int = 0, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed + sum(shape)).standard_normal(shape) / 2, dtype)


CASES: list[Case] = []


def case(name: str, params: Any, args: tuple[Any, ...], expect: dict[str, Roles], **options: Any) -> Callable[..., Any]:
    """Adds the decorated function as a row."""

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        CASES.append(Case(name, fn, params, args, expect, **options))
        return fn

    return add


X = array(B, T, D, seed=1)
W = {"w": array(D, M)}
ONE = {"w": MATRIX}
