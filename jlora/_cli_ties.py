"""Whether a PyTorch model's output head is its embedding, one tensor under two names."""

import re
from collections.abc import Iterator
from typing import Any

from jlora._cli_weights import Weights

HEAD = re.compile(r".*(head|embed_out|output|classifier|score|logit|decoder|unembed).*|out", re.IGNORECASE)
"""Names of modules that give a model's outputs."""


def tied(weights: Weights, apart_from: str = "") -> bool | None:
    """Whether head and embedding are one; ``None`` if nothing tells.

    What the configuration says, at any depth. Where it is silent, transformers ties them, for that is its default, unless the model has a
    head of its own.

    Args:
        weights: The model.
        apart_from: The name of a weight that is no head of its own.
    """
    said = {part["tie_word_embeddings"] for part in parts(weights.config()) if _says(part)}
    if said:
        return True in said
    return False if any(_is_head(weights, name) for name in weights if name != apart_from) else None


def untie(config: dict[str, Any]) -> None:
    """Changes a configuration to say that head and embedding are two."""
    for part in [part for part in parts(config) if _says(part)] or [config]:
        part["tie_word_embeddings"] = False


def parts(config: Any) -> Iterator[dict[str, Any]]:
    """A configuration and those inside it."""
    if isinstance(config, dict):
        yield config
        for part in config.values():
            yield from parts(part)


def last(name: str) -> str:
    """The last word of the name of a weight's module."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _says(part: dict[str, Any]) -> bool:
    return isinstance(part.get("tie_word_embeddings"), bool)


def _is_head(weights: Weights, name: str) -> bool:
    return name.endswith(".weight") and len(weights[name].shape) == 2 and HEAD.fullmatch(last(name)) is not None
