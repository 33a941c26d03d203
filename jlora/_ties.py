"""The two ends of a PyTorch language model, embedding and output head, and what ``config.json`` says of them.

transformers has them as one tensor where ``tie_word_embeddings`` is true, whatever the files hold: a head that differs from the
embedding is dropped then. It asks the configuration of the text model, which may be inside that of another (``text_config``), and
where that is silent the class of the model, which differs from family to family.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

FLAG = "tie_word_embeddings"
EMBEDDINGS = frozenset(
    ("embed_tokens", "wte", "word_embeddings", "tok_embeddings", "tokens_embed", "embeddings", "embed_in", "shared")
)
"""Names of modules that are the embedding of a model of transformers."""
HEADS = frozenset(("lm_head", "embed_out", "proj_out", "generator_lm_head", "vocab_projector", "output_projection"))
"""Names of modules that are its head; others are one only in their place, see ``is_head``."""
_HEAD_ENDS = ("predictions.decoder", "lm_head.decoder", "lm_head.out_proj")
_INSIDE = ("text_config", "decoder", "generator", "llm_config", "language_config")
"""Where configurations have that of their text model."""


def last(name: str) -> str:
    """The last word of the name of a weight's module."""
    return name.removesuffix(".weight").rpartition(".")[2]


def is_embedding(name: str) -> bool:
    """Whether a tensor of this name is a model's embedding."""
    return name.endswith(".weight") and last(name) in EMBEDDINGS


def is_head(name: str) -> bool:
    """Whether a tensor of this name is a model's output head."""
    module = name.removesuffix(".weight")
    return module != name and (last(name) in HEADS or module == "decoder" or module.endswith(_HEAD_ENDS))


def bias_of_head(name: str, weights: Collection[str]) -> str:
    """The name under which a model's files have a bias: BERT's head has that of the module around it."""
    outer = name.removesuffix(".decoder.bias")
    return f"{outer}.bias" if outer != name and name not in weights and f"{outer}.bias" in weights else name


def is_shared(config: Mapping[str, Any], embedding: str) -> bool:
    """Whether encoder and decoder share the embedding: the flag then ties more than the head, and T5 also scales by it."""
    return last(embedding) == "shared" or (config.get("is_encoder_decoder") is True and "decoder." not in embedding)


def parts(config: Any) -> Iterator[dict[str, Any]]:
    """A configuration and those inside it."""
    if isinstance(config, dict):
        yield config
        for part in config.values():
            yield from parts(part)


def says(config: Mapping[str, Any]) -> bool | None:
    """What a configuration says; ``None`` if the class of the model decides."""
    inside = _inside(config)
    asked = [part[FLAG] for part in inside if isinstance(part.get(FLAG), bool)]
    if asked:
        return True in asked
    top = config.get(FLAG)
    return top if isinstance(top, bool) and (top or not inside) else None


def texts(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The configurations of the text models inside one, or itself."""
    return _inside(config) or [config]


def tell(config: dict[str, Any], tied: bool) -> None:
    """Makes a configuration say it wherever one may ask."""
    asked = [config, *_inside(config), *(part for part in parts(config) if isinstance(part.get(FLAG), bool))]
    for part in asked:
        part[FLAG] = tied


def _inside(config: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The configurations of text models inside one, at any depth."""
    found: list[dict[str, Any]] = []
    for name, part in config.items():
        if isinstance(part, dict):
            found += [part] * (name in _INSIDE)
            found += _inside(part)
    return found
