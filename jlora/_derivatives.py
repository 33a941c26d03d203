"""Derivatives that ``apply`` stops or refuses: identities that stay in the program, so that it is the same whoever differentiates it.

A traced program does not know who will differentiate it, so only an equation of its own can stop a derivative in all cases. These are
calls of an empty program: they compute nothing, and compile to nothing.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from jax import lax

from jlora import _jax

Array = Any


@jax.custom_jvp
def jlora_stop_gradient(arrays: list[Any]) -> list[Any]:
    """Returns ``arrays``, or trees of them, whose derivatives are zero. One equation for all."""
    return arrays


@partial(jlora_stop_gradient.defjvp, symbolic_zeros=True)
def _stopped(primals: Any, tangents: Any) -> tuple[list[Any], list[Any]]:
    del tangents
    (arrays,) = primals
    # Whoever differentiates this again must meet a stop too.
    zeros = jax.tree.map(partial(jax.custom_derivatives.zero_from_primal, symbolic_zeros=True), arrays)
    return lax.stop_gradient(arrays), zeros


def is_stop(eqn: Any) -> bool:
    """Whether an equation is ``jlora_stop_gradient``: an adapted function may be part of a function that is adapted."""
    return eqn.primitive.name == "custom_jvp_call" and _jax.function_name(eqn) == "jlora_stop_gradient"


def refuse_derivatives(arrays: Sequence[Array], error: Callable[[], Exception]) -> list[Array]:
    """Returns ``arrays``; raises ``error()`` where a derivative with respect to one of them is taken."""

    @jax.custom_jvp
    def jlora_refuse_derivatives(arrays: list[Array]) -> list[Array]:
        return arrays

    @jlora_refuse_derivatives.defjvp
    def _refused(primals: Any, tangents: Any) -> Any:
        raise error()

    return jlora_refuse_derivatives(list(arrays))
