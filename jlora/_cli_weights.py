"""Base models as the command line knows them: safetensors read and written tensor by tensor, and orbax checkpoints of parameters."""

import itertools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import jax
import numpy as np

from jlora import _checksums, _files, _folders
from jlora._cli_adapters import MARKS, Refusal
from jlora.export import INDEX, ONE, open_weights

Kind = Literal["safetensors", "checkpoint"]
CONV1D = frozenset(
    {
        "gpt2",
        "openai-gpt",
        "imagegpt",
        "decision_transformer",
        "clvp",
        "clvp_encoder",
        "clvp_decoder",
        "jukebox",
        "jukebox_prior",
        "jukebox_vqvae",
    }
)
"""Models of transformers that have ``Conv1D``, whose weights are (in, out); all others have ``nn.Linear``, (out, in)."""
OTHER_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|ggml|onnx|onnx_data|npz|tflite)|.*\.index\.json"
)


class Weights(Mapping[str, _files.Tensor]):
    """The tensors of a PyTorch model by name. Headers were read; contents are when they are asked for.

    Attributes:
        folder: Where the model's other files are, ``None`` if it is a file alone.
        files: Names of tensors by the name of their file, as they lie in it.
    """

    def __init__(self, path: Path):
        self.folder = path if path.is_dir() else None
        self._sources, self._config = _folders.steady(path, _open)
        self.files = {
            source.file.name: sorted(source.header, key=lambda name: (source.header[name].start, name))
            for source in sorted(set(self._sources.values()), key=lambda source: source.file)
        }

    def __getitem__(self, name: str) -> _files.Tensor:
        return self._sources[name].header[name]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.files.values())

    def __len__(self) -> int:
        return len(self._sources)

    def is_float(self, name: str) -> bool:
        """Whether arithmetic can be done with a tensor."""
        return self[name].dtype in _files.FLOATS

    def read(self, name: str) -> np.ndarray:
        """One tensor of floats."""
        return self._sources[name].read(name)

    def copy(self, name: str, to: BinaryIO) -> None:
        """Copies the contents of a tensor, whatever it holds."""
        self._sources[name].copy(name, to)

    def config(self) -> dict[str, Any]:
        """The model's ``config.json``; empty if there is none."""
        return self._config

    def check_standing(self) -> None:
        """Raises if the model was replaced since it was opened: its other files are then not those that belong to it."""
        source = next(iter(self._sources.values()))
        if not source.is_standing():
            raise Refusal(f"{source.file.parent} was replaced while it was read.\n  Run the command again.")


def _open(path: Path) -> tuple[dict[str, _files.Safetensors], dict[str, Any]]:
    """The weights of a model and its configuration, which belong together."""
    file = path / "config.json"
    found = open_weights(path)
    digest = _checksums.read(path).of(file.name, needed=False) if file.exists() else ""
    return found, _files.read_json(file, digest=digest) if file.exists() else {}


def kind_of(path: Path, wanted: str) -> Kind:
    """Which kind of model there is at ``path``; ``wanted`` says how the command takes one."""
    path = _folders.standing(path)
    if path.is_file() and path.suffix == ".safetensors":
        return "safetensors"
    if not path.is_dir():
        raise Refusal(f"There is no model at {path}: {'it is no folder' if path.exists() else 'nothing is there'}.")
    for kind in ("safetensors", "checkpoint"):
        if any((path / mark).exists() for mark in MARKS[kind]):
            return kind
    if (path / "adapter_config.json").exists() or (path / "adapter.json").exists():
        raise Refusal(f"{path} is an adapter, not a model.\n  {wanted}")
    inside = [p for p in sorted(path.iterdir()) if p.is_dir() and any((p / m).exists() for m in MARKS["checkpoint"])]
    pickles = sorted(p.name for p in path.glob("pytorch_model*.bin"))
    more = f"\n  There is a checkpoint inside: {inside[0]}." if inside else ""
    if pickles:
        more = f"\n  {pickles[0]} is a pickle, which is never read: save the model again with safetensors."
    raise Refusal(f"There is no model at {path}: neither {ONE}, nor {INDEX}, nor an orbax checkpoint.{more}")


def sync(f: BinaryIO) -> None:
    """Waits until what was written is on the disk."""
    f.flush()
    os.fsync(f.fileno())


# --- Which way a matrix lies -------------------------------------------------------------------------------------------


class Layout:
    """Which weights are ``Conv1D``, (in, out): what was said with ``--conv1d``, or what the model's type says of all."""

    def __init__(self, weights: Weights, conv1d: str | None):
        self.pattern = None if conv1d is None else compiled("--conv1d", conv1d)
        self.used = False
        config = weights.config()
        types = set(_types(config))
        self.linear = bool(types) and not types & CONV1D and "auto_map" not in config

    def is_conv1d(self, name: str) -> bool | None:
        """Whether a weight is (in, out); ``None`` if nothing tells."""
        if self.pattern is not None:
            found = self.pattern.fullmatch(name) is not None
            self.used |= found
            return found
        return False if self.linear and name.endswith(".weight") else None

    def needed(self, name: str, shape: tuple[int, ...]) -> Refusal:
        """The error where nothing tells."""
        return Refusal(
            f"'{_files.shown(name)}' {shape} may be (out, in), as nn.Linear has it, or (in, out), as GPT-2's Conv1D has it.\n"
            "  Say which weights are Conv1D, by a pattern of whole names: --conv1d '.*c_(attn|proj|fc).weight'.\n"
            "  If none are: --conv1d ''."
        )

    def check_used(self) -> None:
        """Raises if the pattern had no effect."""
        if self.pattern is not None and self.pattern.pattern and not self.used:
            raise Refusal(
                f"--conv1d {self.pattern.pattern!r} matches no weight that is changed.\n  A pattern must match the whole name."
            )


def compiled(option: str, pattern: str) -> re.Pattern[str]:
    """A pattern of whole names; one that is empty matches none."""
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise Refusal(f"{option} {pattern!r} is not a regular expression: {error}.") from None


def _types(config: Any) -> Iterator[str]:
    """The types of a model, and of the models in it."""
    if isinstance(config, dict):
        if isinstance(config.get("model_type"), str):
            yield config["model_type"]
        for value in config.values():
            yield from _types(value)


# --- orbax -------------------------------------------------------------------------------------------------------------


def load_checkpoint(path: Path, *, values: bool = True) -> Any:
    """The parameters of an orbax checkpoint, on the host; or only their shapes."""
    from jlora._restore import TREE, Checkpoint  # here: of models most are safetensors

    if not (_folders.standing(path) / TREE).exists():
        inside = sorted(p.parent for depth in ("*", "*/*") for p in path.glob(f"{depth}/{TREE}"))
        more = "".join(f"\n  There is one inside: {p}." for p in inside[:5])
        raise Refusal(f"The checkpoint at {path} holds no tree of parameters.{more}")
    device = jax.local_devices()[0]

    def load(path: Path) -> Any:
        found = Checkpoint(path)
        return found.read(lambda x: jax.device_put(x, device)) if values else found.shapes

    try:
        return _folders.steady(path, load)
    except OSError as error:
        raise Refusal(f"The checkpoint at {path} cannot be read: {type(error).__name__} {error}.") from error
