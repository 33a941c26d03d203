"""Base models as the command line knows them: safetensors read and written tensor by tensor, and orbax checkpoints of parameters."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _files
from jlora._cli_adapters import MARKS, Refusal
from jlora.export import INDEX, ONE

Kind = Literal["safetensors", "checkpoint"]
FLOATS: Mapping[str, np.dtype] = {
    name: jnp.dtype(dtype)
    for name, dtype in {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}.items()
}
SPELLED = {dtype: name for name, dtype in FLOATS.items()}
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
CHUNK = 16 * 2**20


class Tensor(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int


class Weights(Mapping[str, Tensor]):
    """The tensors of a PyTorch model by name. Headers were read; contents are when they are asked for.

    Attributes:
        folder: Where the model's other files are, ``None`` if it is a file alone.
        files: Names of tensors by the name of their file, as they lie in it.
    """

    def __init__(self, path: Path):
        self.folder = path if path.is_dir() else None
        self.files: dict[str, list[str]] = {}
        self._tensors: dict[str, Tensor] = {}
        for file in _shards(path):
            found = _header(file)
            twice = set(found) & set(self._tensors)
            if twice:
                raise Refusal(f"'{_files.shown(min(twice))}' is in two files of {path}.")
            self._tensors |= found
            self.files[file.name] = list(found)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def is_float(self, name: str) -> bool:
        """Whether arithmetic can be done with a tensor."""
        return self[name].dtype in FLOATS

    def read(self, name: str) -> np.ndarray:
        """One tensor of floats."""
        found = self[name]
        count = found.size // FLOATS[found.dtype].itemsize
        x = np.fromfile(found.file, FLOATS[found.dtype], count, offset=found.start)
        if x.size != count:
            raise Refusal(f"{found.file} was cut while it was read.")
        return x.reshape(found.shape)

    def copy(self, name: str, to: BinaryIO) -> None:
        """Copies the contents of a tensor, whatever it holds."""
        found, left = self[name], self[name].size
        with open(found.file, "rb") as f:
            f.seek(found.start)
            while left:
                piece = f.read(min(CHUNK, left))
                if not piece:
                    raise Refusal(f"{found.file} was cut while it was read.")
                to.write(piece)
                left -= len(piece)

    def config(self) -> dict[str, Any]:
        """The model's ``config.json``; empty if there is none."""
        file = None if self.folder is None else self.folder / "config.json"
        return _files.read_json(file) if file is not None and file.exists() else {}


def kind_of(path: Path) -> Kind:
    """Which kind of model there is at ``path``."""
    if path.is_file() and path.suffix == ".safetensors":
        return "safetensors"
    if not path.is_dir():
        raise Refusal(f"There is no model at {path}: {'it is no folder' if path.exists() else 'nothing is there'}.")
    for kind in ("safetensors", "checkpoint"):
        if any((path / mark).exists() for mark in MARKS[kind]):
            return kind
    if (path / "adapter_config.json").exists() or (path / "adapter.json").exists():
        raise Refusal(f"{path} is an adapter, not a model.\n  The order of merge is: jlora merge BASE ADAPTER OUT.")
    inside = [p for p in sorted(path.iterdir()) if p.is_dir() and any((p / m).exists() for m in MARKS["checkpoint"])]
    pickles = sorted(p.name for p in path.glob("pytorch_model*.bin"))
    more = f"\n  There is a checkpoint inside: {inside[0]}." if inside else ""
    if pickles:
        more = f"\n  {pickles[0]} is a pickle, which is never read: save the model again with safetensors."
    raise Refusal(f"There is no model at {path}: neither {ONE}, nor {INDEX}, nor an orbax checkpoint.{more}")


def _shards(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not (path / INDEX).exists():
        return [path / ONE]
    found = _files.read_json(path / INDEX).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(x, str) for x in found.values()):
        raise Refusal(f"{path / INDEX} has no weight_map.")
    for name in set(found.values()):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise Refusal(f"{path / INDEX} names the file '{_files.shown(name)}', which is not beside it.")
    return [path / name for name in sorted(set(found.values()))]


def _header(file: Path) -> dict[str, Tensor]:
    """The tensors of a file in the order in which they lie there. The library checks that they fill it, one after the other."""
    library = _files.safetensors()
    size = _files.check_regular(file)
    try:
        with library.safe_open(file, framework="np"):
            pass
    except (library.SafetensorError, OSError) as error:
        raise Refusal(f"{file} is no safetensors file, or is damaged: {error}.") from None
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > min(_files.MAX_HEADER, size):
            raise Refusal(f"The header of {file} has {length:,} bytes; at most {_files.MAX_HEADER:,} are read.")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    tensors = {}
    for name, x in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = x["data_offsets"]
        tensors[name] = Tensor(file, x["dtype"], tuple(x["shape"]), 8 + length + start, end - start)
    return tensors


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
            f"'{name}' {shape} may be (out, in), as nn.Linear has it, or (in, out), as GPT-2's Conv1D has it.\n"
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
        return re.compile(pattern)
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
    import orbax.checkpoint as ocp

    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def target(x: Any) -> Any:
        if getattr(x, "shape", None) is None or getattr(x, "dtype", None) is None:
            raise Refusal(
                f"The checkpoint at {path} holds {type(x).__name__} beside arrays: it is no tree of parameters."
            )
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=local)

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.metadata(path)
            tree = getattr(found.item_metadata, "tree", None)
            if not tree:
                raise Refusal(f"The checkpoint at {path} holds no tree of parameters.")
            shapes = jax.tree.map(target, tree)
            return checkpointer.restore(path, shapes) if values else shapes
    except (KeyError, TypeError, AttributeError, OSError, json.JSONDecodeError) as error:
        raise Refusal(f"The checkpoint at {path} cannot be read: {type(error).__name__} {error}.") from error


def save_checkpoint(folder: Path, params: Any) -> None:
    """Writes parameters into an empty folder."""
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, params, force=True)
            checkpointer.wait_until_finished()
    except ValueError as error:  # the storage below reports a full disk so
        raise OSError(f"The checkpoint could not be saved: {error}") from error
