"""Whether a PyTorch model's output head is its embedding, one tensor under two names, and what an adapter of one of them makes of it.

PEFT wraps modules, not tensors: factors or values of one end change that end alone, so that merged the two are tensors of their own. Only
trained tokens, and adapters with ``ensure_weight_tying``, change both.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import numpy as np

from jlora import _files, _paths, _ties
from jlora._cli_adapters import Refusal
from jlora._cli_weights import Weights
from jlora._ties import last as last

HEAD = re.compile(r".*(head|embed_out|output|classifier|score|logit|decoder|unembed).*|out", re.IGNORECASE | re.DOTALL)
"""Names of modules that give a model's outputs."""
# fmt: off
_TIED = frozenset([
    "gemma", "gemma2", "gemma3_text", "cohere", "starcoder2", "smollm3", "falcon", "opt", "xglm", "mamba", "gpt_neo", "mpt", "gpt2",
    "bloom", "openai-gpt",
])
# fmt: on
"""Types whose class ties head and embedding where ``config.json`` is silent (transformers 4.57), of models that only decode."""
# fmt: off
_HEADS = {"gpt_neox": "embed_out.weight", "whisper": "proj_out.weight"} | dict.fromkeys((
    *_TIED, "llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "olmo", "granite", "stablelm", "codegen", "gptj", "persimmon", "helium",
), "lm_head.weight")
# fmt: on
"""The name of the head by the type of the model."""
_HEADLESS = frozenset({"SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION"})
"""Tasks of PEFT whose models have no language model's head."""
_BEGINNING = {"gpt_neox": "gpt_neox.", "mamba": "backbone."} | dict.fromkeys(
    ["gpt2", "gpt_neo", "gptj", "bloom", "falcon", "mpt", "codegen", "openai-gpt"], "transformer."
)
"""By type, how names begin in a model with a head, where that is not ``model.``."""


class Tie(NamedTuple):
    """Two names of one tensor of a model: files have the second, and may have the first too."""

    head: str
    embedding: str


def tied(weights: Weights, apart_from: str = "") -> bool | None:
    """Whether head and embedding are one; ``None`` if nothing tells.

    What the configuration says; where it is silent, the class of the model decides, unless the model has a head of its own.

    Args:
        weights: The model.
        apart_from: The name of a weight that is no head of its own.
    """
    said = _ties.says(weights.config())
    if said is not None:
        return said
    if any(_is_head(weights, name) for name in weights if name != apart_from):
        return False
    return True if kind_of(weights) in _TIED else None


def kind_of(weights: Weights) -> str:
    """The type of the model that has head and embedding; empty if nothing tells."""
    kinds = [part["model_type"] for part in _ties.texts(weights.config()) if isinstance(part.get("model_type"), str)]
    return kinds[0] if kinds else ""


def find(weights: Weights, changed: Collection[str], task: str) -> Tie | None:
    """Head and embedding of a model that ties them, if an adapter changes one; ``None`` if there is no such tie.

    Args:
        weights: The model.
        changed: What the adapter changes, by the model's names.
        task: Of the adapter, as PEFT has it.
    """
    ends = [name for name in changed if _ties.is_head(name) or _ties.is_embedding(name)]
    if not ends or task in _HEADLESS or tied(weights) is not True:
        return None
    heads = _one(filter(_ties.is_head, ends)) or _one(filter(_ties.is_head, weights))
    tables = _one(filter(_ties.is_embedding, ends)) or _one(filter(_ties.is_embedding, weights))
    heads = heads or list(filter(None, [head_of(weights)]))
    if len(heads) == len(tables) == 1 and tables[0] in weights:
        return Tie(heads[0], tables[0])
    raise Refusal(
        f"config.json says that head and embedding are one, and the adapter changes {_listed(ends)}: which tensors they are is not plain.\n"
        f"  {say_which(weights, heads, tables)}"
    )


def head_of(weights: Weights) -> str:
    """The name of the head of a model that ties it to its embedding; empty if nothing tells."""
    return _HEADS.get(kind_of(weights), "") if tied(weights) is True else ""


def unsure(weights: Weights, changed: Iterable[str], task: str) -> Refusal | None:
    """The error if an adapter changes an embedding that may be the head as well."""
    names = [name for name in changed if _ties.is_embedding(name) and name in weights]
    if not names or task in _HEADLESS or tied(weights) is not None:
        return None
    return Refusal(
        f"The adapter changes {_listed(names[:1])}, which may be the output head as well: the model has no other, and "
        "config.json does not say.\n"
        f'  If it is not, put "tie_word_embeddings": false there. If it is: {say_which(weights, [], names)}'
    )


def say_which(weights: Weights, heads: list[str], tables: list[str]) -> str:
    """The option that tells which tensor is the head."""
    tables = tables or list(filter(_ties.is_embedding, weights))
    head, table = (names[0] if len(names) == 1 else word for names, word in ((heads, "HEAD"), (tables, "EMBEDDING")))
    wanted = [(head == "HEAD", "HEAD is the head's name in PyTorch, often lm_head.weight"),
              (table == "EMBEDDING", "EMBEDDING is the embedding's name in the base")]  # fmt: skip
    more = "; ".join(text for needed, text in wanted if needed)
    return f"--tied {_files.shown(head)}={_files.shown(table)}" + (f" ({more})" if more else "")


def check_can_untie(weights: Weights, changed: Collection[str], task: str) -> None:
    """Raises if an adapter changes one of several names of an embedding that encoder and decoder share.

    No configuration has them apart and all else as it was: the flag that ties the head ties these too, and T5 scales by it.
    """
    config = weights.config()
    shared = [name for name in weights if _ties.is_embedding(name) and _ties.is_shared(config, name)]
    ends = [name for name in changed if _ties.is_head(name) or _ties.is_embedding(name)]
    if (
        shared
        and any(name not in weights for name in ends)
        and _ties.says(config) is not False
        and task not in _HEADLESS
    ):
        kind = config.get("model_type", "this type")
        raise Refusal(
            f"The adapter changes {_listed(ends)}, of which the base has one weight, '{_files.shown(shared[0])}'. "
            f"A model of type {_files.shown(kind)} cannot untie them:\n"
            "  its tie_word_embeddings also ties encoder and decoder, or scales. No merged model computes what the adapter does.\n"
            "  Keep the adapter beside its base, as PEFT loads it."
        )


def check_one(weights: Weights, tie: Tie) -> None:
    """Raises if the base's files have both, and they differ."""
    if tie.head in weights and not np.array_equal(weights.read(tie.head), weights.read(tie.embedding)):
        raise Refusal(
            f"The base has '{_files.shown(tie.head)}' and '{_files.shown(tie.embedding)}', which differ, though head and embedding are "
            'said to be one.\n  If they are two, put "tie_word_embeddings": false into its config.json, and leave out --tied.'
        )


def check_beginning(weights: Weights, tie: Tie) -> None:
    """Raises if the base's names are those of a model without a head: transformers does not load them beside one."""
    if tie.head not in weights and tie.embedding.count(".") == 1:
        beginning = _BEGINNING.get(kind_of(weights), "model.")
        raise Refusal(
            f"The merged model has a head of its own, '{_files.shown(tie.head)}', and the base's names, such as "
            f"'{_files.shown(tie.embedding)}', are those of a model without one.\n"
            f"  Say how they begin in the whole model, and they are written so: --prefix {beginning}="
        )


def untie(config: dict[str, Any]) -> None:
    """Changes a configuration to say that head and embedding are two."""
    _ties.tell(config, False)


def _one(names: Iterable[str]) -> list[str]:
    return sorted(set(names))


def _listed(names: Collection[str]) -> str:
    return _paths.listing([f"'{_files.shown(name)}'" for name in names], 3)


def _is_head(weights: Weights, name: str) -> bool:
    return name.endswith(".weight") and len(weights[name].shape) == 2 and HEAD.fullmatch(last(name)) is not None
