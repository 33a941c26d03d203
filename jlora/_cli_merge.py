"""``jlora merge``: an adapter folded into a model, tensor by tensor."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from jlora import _cli_ties as ties
from jlora import _files, _paths, _peft_config
from jlora._adapters import Adapter, FullWeight, LowRank
from jlora._cli_adapters import Opened, Refusal, new_folder
from jlora._cli_weights import OTHER_WEIGHTS, Layout, Weights, load_checkpoint, sync
from jlora._export_tree import write_merged
from jlora._fold import Fold
from jlora._peft_keys import part_of
from jlora._peft_read import open_tensors
from jlora.export import INDEX, ONE

Step = Callable[[str], None]


@dataclass
class Report:
    """What was done.

    Attributes:
        lost: For each weight with an update, what rounding lost of it, relative to its norm.
        replaced: Tensors that the adapter has whole.
        added: Those of them that the base does not have.
        copied: Other files that were copied.
        left_out: Other files and folders that were not.
        untied: Whether a head was added to a base that ties its own to its embedding.
    """

    lost: dict[str, float] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    untied: bool = False


# --- safetensors and PEFT ----------------------------------------------------------------------------------------------


class Plan:
    """What becomes of each tensor of a model.

    Args:
        weights: The model.
        found: A PEFT adapter.
        conv1d: See ``Layout``.
        renamed: A beginning of the adapter's names, and what stands for it in the model's.
        tied: Names of the adapter that are another name of the model's in PyTorch.
        add_new: Whether the adapter may have whole tensors that the model does not have.
    """

    def __init__(
        self,
        weights: Weights,
        found: Opened,
        *,
        conv1d: str | None,
        renamed: tuple[str, str],
        tied: Mapping[str, str],
        add_new: bool,
    ):
        self.weights, self.layout = weights, Layout(weights, conv1d)
        self.config = _peft_config.read(found.path)
        self.low: dict[str, tuple[LowRank, bool]] = {}
        self.full: dict[str, FullWeight] = {}
        self.added: list[str] = []
        names = {path: self.name(path, *renamed) for path in found.lora}
        if renamed != ("", "") and not any(path.startswith(renamed[0]) for path in names):
            raise Refusal(
                f"No name of the adapter begins with '{renamed[0]}' (--prefix): {_paths.listing(list(names), 3)}."
            )
        for one, two in tied.items():
            _check_tied(found.lora, one, two)
        missing = [p for p, n in names.items() if n not in weights and p not in tied]
        if add_new:
            self.added = [p for p in missing if isinstance(found.lora[p], FullWeight)]
        lost = [path for path in missing if path not in self.added]
        if lost:
            raise self._not_there(lost, names, found.lora)
        for path in (p for p in found.lora if p not in tied):
            self._put(path, names[path], found.lora[path])
        self.layout.check_used()
        self._check_carried(found.path, renamed)
        self._check_untied(tied)

    def _check_carried(self, adapter: Path, renamed: tuple[str, str]) -> None:
        """PEFT writes the base's embedding beside factors for it, and loads it from there: it has to be the base's."""
        tensors = open_tensors(adapter)
        for key in tensors.header:
            part = part_of(key)
            name = self.name(f"{part.module}.weight", *renamed)
            if part.role != "weight" or not key.endswith(".base_layer.weight") or name not in self.weights:
                continue
            mine, theirs = self.weights.read(name), tensors.read(key)
            coarse = max(float(jnp.finfo(x.dtype).eps) for x in (mine, theirs))
            mine, theirs = mine.astype(np.float32), theirs.astype(np.float32)
            if mine.shape != theirs.shape or not np.allclose(mine, theirs, rtol=2 * coarse, atol=1e-6):
                raise Refusal(
                    f"The adapter carries '{_files.shown(key)}', which is not '{_files.shown(name)}' of the base.\n"
                    "  It was trained on another base, or its vocabulary was changed."
                )

    def _check_untied(self, tied: Mapping[str, str]) -> None:
        """Where the base ties its head to its embedding, PEFT changes only the one that the adapter is for."""
        found = ties.tied(self.weights)
        if found is False or tied:
            return
        ends = ("embed_tokens", "wte", "word_embeddings", "shared", "lm_head", "embed_out", "embed_in")
        names = [
            n for n in (*self.low, *self.full) if n in self.weights
        ]  # a head that is added says itself that it is apart
        changed = [n for n in names if n.removesuffix(".weight").split(".")[-1] in ends]
        if changed and found:
            raise Refusal(
                f"config.json says that head and embedding are one, and the adapter changes '{_files.shown(changed[0])}' alone: as PEFT "
                "has it they are two from then on.\n"
                "  If it was trained with both tied: --tied lm_head.weight=model.embed_tokens.weight. Else merge with PEFT."
            )
        if changed:
            raise Refusal(
                f"The adapter changes '{_files.shown(changed[0])}', which may be the output head as well: the model has no other, and "
                "config.json does not say. As PEFT has it they are two from then on.\n"
                '  If it is not, put "tie_word_embeddings": false there. If it was trained with both tied: --tied '
                "lm_head.weight=model.embed_tokens.weight. Else merge with PEFT."
            )

    def unties(self) -> bool:
        """Whether a head is added to a base that ties its own to its embedding."""
        heads = [p for p in self.added if p.removesuffix(".weight").split(".")[-1] in ("lm_head", "embed_out")]
        return bool(heads) and ties.tied(self.weights) is not False

    @staticmethod
    def name(path: str, old: str, new: str) -> str:
        """The name in the model of a weight of the adapter."""
        return new + path.removeprefix(old) if path.startswith(old) else path

    def _not_there(self, lost: list[str], names: Mapping[str, str], lora: Mapping[str, Adapter]) -> Refusal:
        first = names[lost[0]]
        hints = [f"nearest to the first: {', '.join(_paths.nearest(first, self.weights))}"]
        for cut in range(1, first.count(".")):
            tail = ".".join(first.split(".")[cut:])
            ends = [n for n in self.weights if n == tail or n.endswith(f".{tail}")]
            if len(ends) == 1:
                hints.append(
                    f"If these are the same: --prefix {_files.shown(first.removesuffix(tail))}={_files.shown(ends[0].removesuffix(tail))}"
                )
                break
        if all(isinstance(lora[path], FullWeight) for path in lost):
            hints.append("If the adapter brings a head that the base does not have: --add-new")
        if any(path.endswith("lm_head.weight") for path in lost):
            hints.append("If the base ties it to its embedding: --tied lm_head.weight=model.embed_tokens.weight")
        listed = _paths.listing([_files.shown(path) for path in lost], 4)
        return Refusal(f"The base lacks {len(lost)} of the adapter's weights: {listed}.\n  " + "\n  ".join(hints))

    def _put(self, path: str, name: str, adapter: Adapter) -> None:
        if name in self.low or name in self.full:
            raise Refusal(f"Two weights of the adapter are '{_files.shown(name)}' in the base.")
        if name in self.weights:
            have = self.weights[name]
            if not self.weights.is_float(name):
                raise Refusal(
                    f"'{_files.shown(name)}' in the base holds {have.dtype}, which nothing can be added to.\n"
                    "  Merge into the model that was not quantised."
                )
            if isinstance(adapter, LowRank):
                as_is = len(adapter.shape) == 2 and self.config.is_parameter(path)
                if as_is and have.shape != adapter.shape:
                    raise self._unlike(name, have.shape, adapter)
                self.low[name] = adapter, not as_is and self._turned(name, have.shape, adapter)
                return
            if have.shape != adapter.shape:
                raise self._unlike(name, have.shape, adapter)
        assert isinstance(adapter, FullWeight)
        self.full[name] = adapter

    def _turned(self, name: str, have: tuple[int, ...], adapter: LowRank) -> bool:
        """Whether the update is to be transposed, its last two axes exchanged."""
        want = adapter.shape
        other = (*want[:-2], *want[:-3:-1])
        matrix = adapter.use == "linear" and len(want) in (2, 3)
        if not matrix or want != other:
            if have == want:
                return False
            if not matrix or have != other:
                raise self._unlike(name, have, adapter)
            if self.layout.pattern is not None:
                self.layout.is_conv1d(name)
            return True
        if have != want:
            raise self._unlike(name, have, adapter)
        turned = self.layout.is_conv1d(name)
        if turned is None:
            raise self.layout.needed(name, want)
        return turned

    @staticmethod
    def _unlike(name: str, have: tuple[int, ...], adapter: Adapter) -> Refusal:
        return Refusal(
            f"'{_files.shown(name)}' is {have} in the base, and {adapter.shape} in the adapter.\n"
            "  It was trained on another base, or on one whose table was resized: resize the base's as well."
        )


def _check_tied(lora: Mapping[str, Adapter], one: str, two: str) -> None:
    """Raises unless two weights of the adapter have one update, or one value."""
    for path in (one, two):
        if path not in lora:
            near = ", ".join(_paths.nearest(path, lora))
            raise Refusal(f"The adapter has no '{path}' (--tied).\n  nearest: {near}")
    updates = [np.asarray(x.value if isinstance(x, FullWeight) else x.delta(None)) for x in (lora[one], lora[two])]
    kinds = {type(lora[one]), type(lora[two])}
    shapes = {x.shape for x in updates}
    if len(kinds) > 1 or len(shapes) > 1 or np.linalg.norm(updates[0] - updates[1]) > 1e-5 * np.linalg.norm(updates[0]):
        raise Refusal(
            f"'{_files.shown(one)}' and '{_files.shown(two)}' are one weight in the base (--tied), but were adapted apart.\n"
            "  No merged model that ties them has both updates: untie the base first."
        )


def merge_safetensors(plan: Plan, out: Path, fold: Fold, force: bool, step: Step) -> Report:
    """Writes the merged model in the files of the base."""
    weights, report = plan.weights, Report(untied=plan.unties())
    name_of = {file: (file if weights.folder is not None else ONE) for file in weights.files}
    files = {name_of[file]: list(names) for file, names in weights.files.items()}
    report.added = [name for name in plan.full if name not in weights]
    report.replaced = [name for name in plan.full if name in weights]
    files[list(files)[-1]] += report.added
    with new_folder(out, "safetensors", force) as part:
        sizes: dict[str, int] = {}
        for file, names in files.items():
            sizes |= _write_file(part / file, names, plan, fold, step)
        if (weights.folder is not None and (weights.folder / INDEX).exists()) or len(files) > 1:
            where = {name: file for file, names in files.items() for name in names}
            _files.write_json(part / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
        if weights.folder is not None:
            _copy_rest(weights.folder, part, set(files), fold.dtype, report)
    report.lost = fold.lost
    return report


def _write_file(file: Path, names: list[str], plan: Plan, fold: Fold, step: Step) -> dict[str, int]:
    """Writes one file tensor by tensor, and returns their sizes."""
    dtypes = {name: _dtype_of(plan, name, fold) for name in names}
    entries = [_entry(plan, name, dtypes[name]) for name in names]
    with open(file, "wb") as f:
        _files.write_header(f, entries)
        for name, dtype in dtypes.items():
            if dtype is None or (name in plan.weights and _untouched(plan, name, dtype)):
                plan.weights.copy(name, f)
            else:
                contents = np.ascontiguousarray(_contents(plan, name, dtype, fold))
                f.write(contents.reshape(-1).view(np.uint8).data)
            step(name)
        sync(f)
    return {e.name: e.size for e in entries}


def _dtype_of(plan: Plan, name: str, fold: Fold) -> np.dtype | None:
    """Of a tensor that is written; ``None`` if it holds no floats and is copied."""
    if name in plan.weights:
        return fold.dtype_of(_files.FLOATS[plan.weights[name].dtype]) if plan.weights.is_float(name) else None
    common = (_files.FLOATS[t.dtype] for t in plan.weights.values() if t.dtype in _files.FLOATS)
    return fold.dtype_of(next(common, np.dtype(np.float32)))


def _entry(plan: Plan, name: str, dtype: np.dtype | None) -> _files.Entry:
    if dtype is None:
        have = plan.weights[name]
        return _files.Entry(name, have.dtype, have.shape, have.size)
    shape = plan.weights[name].shape if name in plan.weights else plan.full[name].shape
    return _files.Entry(name, _files.SPELLED[dtype], shape, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)


def _untouched(plan: Plan, name: str, dtype: np.dtype) -> bool:
    return name not in plan.low and name not in plan.full and _files.FLOATS[plan.weights[name].dtype] == dtype


def _contents(plan: Plan, name: str, dtype: np.dtype, fold: Fold) -> np.ndarray:
    if name in plan.full:
        return fold.stored(name, np.asarray(plan.full[name].value), dtype)
    w = plan.weights.read(name)
    if name not in plan.low:
        return fold.stored(name, w, dtype)
    adapter, turned = plan.low[name]
    update = np.asarray(adapter.delta(None))
    return fold.added(name, w, update.swapaxes(-1, -2) if turned else update)


def _copy_rest(base: Path, to: Path, written: set[str], dtype: np.dtype | None, report: Report) -> None:
    """Configuration, tokeniser and whatever else is no weight; the base's weights in other formats are not the merged ones."""
    for path in sorted(base.iterdir()):
        if path.name in written or path.name == INDEX:
            continue
        if not path.is_file() or OTHER_WEIGHTS.fullmatch(path.name) or path.name.startswith("."):
            report.left_out.append(path.name)
            continue
        shutil.copyfile(path, to / path.name)
        report.copied.append(path.name)
    if (to / "config.json").exists():
        _change_config(to / "config.json", dtype, report.untied)


def _change_config(file: Path, dtype: np.dtype | None, untied: bool) -> None:
    found = _files.read_json(file)
    before = json.dumps(found)
    if dtype is not None:
        for part in ties.parts(found):
            part |= {key: str(dtype) for key in ("torch_dtype", "dtype") if isinstance(part.get(key), str)}
    if untied:
        ties.untie(found)
    if json.dumps(found) != before:
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


# --- orbax -------------------------------------------------------------------------------------------------------------


def merge_checkpoint(base: Path, adapter: Path, out: Path, fold: Fold, force: bool, begin: Any) -> Report:
    """Writes the merged parameters as an orbax checkpoint; the base is in memory, and of what is merged a leaf at a time."""
    params = load_checkpoint(base)
    lora = jlora.load(adapter, params)
    with begin(len(jax.tree.leaves(params))) as step:
        write_merged(out, params, lora, fold, overwrite=force, progress=lambda name, done, total: step(name))
    whole = [path for path in lora if isinstance(lora[path], FullWeight)]
    return Report(lost={path: x for path, x in fold.lost.items() if path not in whole}, replaced=whole)
