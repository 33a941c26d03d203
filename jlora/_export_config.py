"""``config.json`` of an export, which must say of head and embedding what the weights beside it are."""

import copy
import json
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from jlora import _files, _ties


def as_mapping(config: Any) -> dict[str, Any] | None:
    """A copy of ``config``, a mapping or an object with ``to_dict``.

    Raises:
        TypeError: it is neither, or holds what JSON has not.
    """
    if config is None:
        return None
    found = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
    if not isinstance(found, Mapping):
        raise TypeError(
            "config must be a mapping, what config.json holds, or an object with to_dict(), as configurations of transformers are.\n"
            f"  got: {type(config).__name__}"
        )
    try:
        json.dumps(dict(found), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(f"config must hold what JSON has: {error}.") from None
    return copy.deepcopy(dict(found))


class Ends:
    """Embedding and head among the tensors of an export: whether they are the same.

    Args:
        tensors: Of each the name, the shape, and whether its leaf is looked up and also multiplied with.
    """

    def __init__(self, tensors: Iterable[tuple[str, tuple[int, ...], bool]]):
        tensors = list(tensors)
        self.heads = {name: shape for name, shape, _ in tensors if _ties.is_head(name) and len(shape) == 2}
        self.embeddings = {name: shape for name, shape, _ in tensors if _ties.is_embedding(name) and len(shape) == 2}
        self.tied = [name for name, _, both in tensors if both and name in self.embeddings and not self.heads]
        self._digests: dict[str, bytes] = {}

    @property
    def matter(self) -> bool:
        """Whether the flag of the configuration has to do with these tensors."""
        return bool(self.heads and self.embeddings) or bool(self.tied)

    def saw(self, name: str, contents: Any) -> None:
        """Takes note of what is written."""
        if self.heads and self.embeddings and (name in self.heads or name in self.embeddings):
            self._digests[name] = sha256(contents).digest()

    def mend(self, config: dict[str, Any]) -> None:
        """Makes ``config`` say whether head and embedding are one.

        Raises:
            ValueError: it says what is not so, and no other value of the flag would be right.
        """
        if self.tied:
            self._mend_one(config, self.tied[0])
            return
        apart = next(
            ((h, e) for h in self.heads for e in self.embeddings if self._digests.get(h) != self._digests.get(e)), None
        )
        if apart is None or _ties.says(config) is False:
            return
        head, embedding = map(_files.shown, apart)
        if any(_ties.is_shared(config, name) for name in self.embeddings):
            raise ValueError(
                f"'{head}' differs from '{embedding}', and the configuration does not say that they are two.\n"
                "  In a model whose encoder and decoder share the embedding, tie_word_embeddings does more than that, such as the scaling "
                "of T5.\n  If the model was made with it false: put 'tie_word_embeddings': False into config. "
                "Else train head and embedding as one leaf, with both names."
            )
        _ties.tell(config, False)

    def _mend_one(self, config: dict[str, Any], name: str) -> None:
        """A leaf that is both: files hold it once, and who reads one makes the head of it."""
        said = _ties.says(config)
        if said is False:
            raise ValueError(
                f"'{_files.shown(name)}' is embedding and head in one, and the configuration says that these are two: the head would be "
                "missing.\n  Put 'tie_word_embeddings': True into config."
            )
        if said is None and "model_type" in config and not _ties.is_shared(config, name):
            _ties.tell(config, True)


def kept(folder: Path, config: dict[str, Any] | None, ends: Ends) -> dict[str, Any] | None:
    """The configuration to mend: ``config``, or the one that stays in a folder that is overwritten."""
    file = folder / "config.json"
    return _files.read_json(file) if config is None and ends.matter and file.is_file() else config
