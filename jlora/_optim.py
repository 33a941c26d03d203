"""Masks, labels and frozen optimisers for optax, on any tree that holds adapters."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import jax

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
        ValueError: there is no adapter in ``tree``.

    Example:
        >>> import optax, jlora
        >>> trained = {"a": optax.adam(1e-3), "b": optax.adam(1.6e-2), "full": optax.adam(1e-3)}
        >>> tx = optax.partition(trained | {"frozen": optax.set_to_zero()}, jlora.labels)
    """
    found = [leaf for leaf in jax.tree.leaves(tree, is_leaf=is_adapter) if is_adapter(leaf)]
    if not found:
        raise ValueError(
            "There is no adapter in this tree: nothing would be trained.\n  Pass a tree that holds what jlora.init returned."
        )
    return jax.tree.map(_name_leaves, tree, is_leaf=is_adapter)


def trainable(tree: Any) -> Any:
    """The boolean tree for ``optax.masked``: true for the arrays of adapters, false for everything else.

    ``optax.masked`` hands on what it masks out as it came: the base stays as it is because its gradients are zero. Where they are
    not (a penalty on the base, ``train_base=True``), use ``freeze``.

    Args:
        tree: As for ``labels``.

    Raises:
        ValueError: there is no adapter in ``tree``.

    Example:
        >>> import optax, jlora
        >>> tx = optax.masked(optax.adamw(1e-3), jlora.trainable)
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


def _name_leaves(node: Any) -> Any:
    if not is_adapter(node):
        return FROZEN
    # By field: one of them may be empty, masked out by whoever holds the tree.
    return replace(
        node, **{name: jax.tree.map(lambda _, x=label: x, getattr(node, name)) for name, label in node.labels.items()}
    )
