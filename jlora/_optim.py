"""Masks, labels and frozen optimisers for optax, on any tree that holds adapters."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jlora._adapters import is_adapter

if TYPE_CHECKING:
    import optax

FROZEN = "frozen"


def labels(tree: Any) -> Any:
    """Names each leaf for ``optax.partition``: ``a`` and ``b`` (factors), ``full`` (leaves trained outright), else ``frozen``.

    Args:
        tree: Any tree that holds adapters: the adapter itself, ``{"base": params, "lora": lora}``, a train state.

    Returns:
        A tree of the same structure with a string in each leaf.

    Raises:
        TypeError: ``tree`` is a number: optax took this function for a schedule.
        ValueError: there is no adapter in ``tree``.

    Example:
        >>> import optax, jlora
        >>> trained = {"a": optax.adam(1e-3), "b": optax.adam(1.6e-2), "full": optax.adam(1e-3)}
        >>> tx = optax.partition(trained | {"frozen": optax.set_to_zero()}, jlora.labels)
    """
    if _is_number(tree):
        raise TypeError(
            "A mask or a label needs a tree that holds adapters.\n  got: a number\n"
            "  optax.inject_hyperparams calls every function as a schedule, with the number of the step, unless it is told not to:\n"
            "  optax.inject_hyperparams(optax.adamw, static_args='mask')(learning_rate=1e-3, mask=jlora.trainable)."
        )
    found = [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_adapter) if is_adapter(leaf)]
    if not found:
        raise ValueError(
            "There is no adapter in this tree: nothing would be trained.\n  Pass a tree that holds what jlora.init returned."
        )
    return jax.tree.map(_name_leaves, tree, is_leaf=is_adapter)


def trainable(tree: Any) -> Any:
    """The boolean tree of what is trained: true for the arrays of adapters, false for everything else.

    It is a mask and freezes nothing: ``optax.masked(tx, jlora.trainable)`` passes gradients of the base on as updates, and adds them to
    the base where they are not zero (a penalty on the base, ``train_base=True``). Use ``freeze`` to train a tree that holds the base.

    Args:
        tree: As for ``labels``.

    Raises:
        TypeError: ``tree`` is a number: optax took this function for a schedule.
        ValueError: there is no adapter in ``tree``.

    Example:
        >>> import optax, jlora
        >>> tx = jlora.freeze(optax.chain(optax.adam(1e-3), optax.add_decayed_weights(1e-4, mask=jlora.trainable)))
        >>> adamw = optax.inject_hyperparams(optax.adamw, static_args="mask")  # optax takes other functions for schedules
        >>> tx = jlora.freeze(adamw(learning_rate=1e-3, mask=jlora.trainable))
    """
    return jax.tree.map(lambda label: label != FROZEN, labels(tree))


def freeze(tx: "optax.GradientTransformation") -> "optax.GradientTransformation":
    """Wraps an optimiser so that only adapters are trained: other leaves get zero updates and no optimiser state.

    Clipping by global norm inside ``tx`` sees the adapters only.

    Args:
        tx: Any optax transformation.

    Returns:
        A transformation for trees that hold adapters and the base.

    Example:
        >>> import optax, jlora
        >>> tx = jlora.freeze(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)))
    """
    import optax  # here, so that `import jlora` stays quick

    if not (hasattr(tx, "init") and hasattr(tx, "update")):
        raise TypeError(f"freeze takes an optax transformation.\n  got: {type(tx).__name__}")

    def groups(tree: Any) -> Any:
        return jax.tree.map(lambda label: FROZEN if label == FROZEN else "trained", labels(tree))

    return optax.partition({"trained": tx, FROZEN: optax.set_to_zero()}, groups)


def _is_number(tree: Any) -> bool:
    return isinstance(tree, int | float) or (hasattr(tree, "dtype") and np.ndim(tree) == 0)


def _name_leaves(node: Any) -> Any:
    if not is_adapter(node):
        return FROZEN
    # By field: one of them may be empty, masked out by whoever holds the tree.
    return replace(
        node, **{name: jax.tree.map(lambda _, x=label: x, getattr(node, name)) for name, label in node.labels.items()}
    )
