"""Values of a base, where adapters alone do not tell them: of leaves that are trained outright."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora import _files, _paths
from jlora._adapters import FullWeight, LowRank, fingerprint
from jlora._cli_adapters import Opened, Refusal, open_several
from jlora._cli_weights import Layout, Weights, kind_of, load_checkpoint


class Values(Mapping[str, np.ndarray]):
    """The tensors of a PyTorch model, read when they are asked for.

    Args:
        weights: The model.
        name: The name in the model of a name of the adapter.
    """

    def __init__(self, weights: Weights, name: Callable[[str], str] = str):
        self._weights, self._name = weights, name

    def __contains__(self, path: object) -> bool:
        return self._name(str(path)) in self._weights and self._weights.is_float(self._name(str(path)))

    def __getitem__(self, path: str) -> np.ndarray:
        return self._weights.read(self._name(path))

    def is_turned(self, path: str, x: LowRank, conv1d: str | None) -> bool:
        """Whether a square weight lies in the model as the transpose of what factors are for, as ``Conv1D`` has it.

        Others that do are refused before: they are of another shape.
        """
        if x.use != "linear" or x.shape[-2] != x.shape[-1]:
            return False
        layout = Layout(self._weights, conv1d)
        turned = layout.is_conv1d(path)
        if turned is None:
            raise layout.needed(_files.shown(path), x.shape)
        return turned

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def open_base(path: Path, form: str) -> Any:
    """The base of adapters of a format: a PyTorch model, or the parameters of a checkpoint."""
    path = _files.folder(path)
    kind = kind_of(path, "--base takes the model that it is for.")
    if kind != {"peft": "safetensors", "orbax": "checkpoint"}[form]:
        wanted = "safetensors, under PyTorch's names" if form == "peft" else "an orbax checkpoint of parameters"
        raise Refusal(f"--base of adapters of this format ({form}) is {wanted}.\n  got: {path} ({kind})")
    return Values(Weights(path)) if form == "peft" else load_checkpoint(path)


def open_all(given: Sequence[Path], base: Path | None, form: str) -> tuple[list[Opened], Any, Any]:
    """Adapters of one base, what of it they need, and the base."""
    whole = None if base is None else open_base(base, form)
    found = open_several(given, whole if form == "peft" else None)
    return found, values_of(whole, found), whole


def values_of(base: Any, found: Sequence[Opened]) -> Any:
    """What of the base the adapters have whole, as the parameters that ``jlora.algebra`` takes."""
    if base is None:
        return None
    if not isinstance(base, Values):
        paths, leaves, _ = _paths.flatten(base)
        for x in found:
            difference = next(iter(x.lora.values())).base.difference(fingerprint(paths, leaves))
            if difference:
                raise Refusal(f"{x.path} was made for another base than --base: {difference}.")
        return base
    whole = {path: x.path for x in found for path, adapter in x.lora.items() if isinstance(adapter, FullWeight)}
    for path, where in whole.items():
        if path not in base:
            near = ", ".join(map(_files.shown, _paths.nearest(path, base)))
            raise Refusal(f"--base lacks '{_files.shown(path)}', which {where} has whole.\n  nearest: {near}")
    return {path: base[path] for path in whole}
