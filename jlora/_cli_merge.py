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
from jlora import _cli_adapters as adapters
from jlora import _cli_ties, _files, _paths, _ties
from jlora._adapters import Adapter, FullWeight, LowRank
from jlora._checksums import FILE as CHECKSUMS
from jlora._cli_adapters import Opened, Refusal, new_folder
from jlora._cli_base import Values
from jlora._cli_ties import Tie
from jlora._cli_weights import OTHER_WEIGHTS, Layout, Weights, load_checkpoint, sync
from jlora._export_tree import write_merged
from jlora._fold import Fold
from jlora._peft_declared import Base
from jlora._peft_keys import part_of
from jlora._peft_read import declared_of
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
        untied: Whether head and embedding are one in the base and two in the merged model.
    """

    lost: dict[str, float] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    untied: bool = False


# --- safetensors and PEFT ----------------------------------------------------------------------------------------------


def open_adapter(path: Path, weights: Weights, renamed: tuple[str, str]) -> Opened:
    """Reads a PEFT adapter for a model, after a look at its names."""

    def name(path: str) -> str:
        return Plan.name(path, *renamed)

    files = adapters.open_files(path)
    if files is not None:
        modules = {part_of(key).module for key in files.tensors.header}
        task = str(files.about.get("task_type", ""))
        _cli_ties.check_can_untie(weights, [name(f"{module}.weight") for module in sorted(modules)], task)
    return adapters.open_adapter(path, Values(weights, name), files=files)


class Plan:
    """What becomes of each tensor of a model.

    Args:
        weights: The model.
        found: A PEFT adapter.
        conv1d: See ``Layout``.
        renamed: A beginning of the adapter's names, and what stands for it in the model's.
        tied: Names of PyTorch that are, in the model's files, another: of a head, its embedding's.
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
        assert found.files is not None  # what is no PEFT adapter does not come here
        self.config, self.tensors = found.files.config, found.files.tensors
        self.task = str(found.about.get("task_type", ""))
        self.low: dict[str, tuple[LowRank, bool]] = {}
        self.full: dict[str, FullWeight] = {}
        self.sources: dict[str, str] = {}
        self.untied = False
        self.names = {path: _ties.bias_of_head(self.name(path, *renamed), weights) for path in found.lora}
        lora = {self.names[path]: x for path, x in found.lora.items()}
        ties = self._ties(tied, renamed, lora)
        for tie in ties:
            _cli_ties.check_one(weights, tie)
            self._resolve(tie, lora)
            if self.untied and renamed == ("", ""):
                _cli_ties.check_beginning(weights, tie)
        if renamed != ("", "") and not self.untied and not any(p.startswith(renamed[0]) for p in self.names):
            raise Refusal(
                f"No name of the adapter begins with '{renamed[0]}' (--prefix): {_paths.listing(list(self.names), 3)}."
            )
        lost = [name for name in lora if self.source(name) not in weights]
        if add_new:
            lost = [name for name in lost if not isinstance(lora[name], FullWeight)]
        if lost:
            raise self._not_there(lost, lora)
        for path, name in self.names.items():
            if name in lora:
                self._put(path, name, lora[name])
        for tie in ties:
            self._complete(tie)
        self.added = [name for name in {**self.full, **self.sources} if name not in weights]
        inside = {name for path, name in self.names.items() if path.startswith(renamed[0])}
        self.beginning = renamed[0] if set(self.added) - inside and not renamed[1] else ""
        self.layout.check_used()
        self._check_carried(renamed)
        self._check_declared(found, renamed)
        refusal = None if ties else _cli_ties.unsure(weights, [*self.low, *self.full], self.task)
        if refusal is not None and not any(_ties.is_head(name) for name in self.added):
            raise refusal

    def source(self, name: str) -> str:
        """The tensor of the base that a tensor of the merged model is made from."""
        return self.sources.get(name, name)

    def spelled(self, name: str) -> str:
        """The name of a tensor in the merged model: a base without a head leaves out how names begin in one that has one."""
        return name if name not in self.weights or name.startswith(self.beginning) else self.beginning + name

    def _ties(self, said: Mapping[str, str], renamed: tuple[str, str], lora: Mapping[str, Adapter]) -> list[Tie]:
        """The weights that are one in the base, as far as the adapter changes them."""
        if not said:
            stays = self._changes_both(lora, _cli_ties.tied(self.weights) is True) and not any(
                _ties.is_head(name) for name in (*lora, *self.weights)
            )
            found = None if stays else _cli_ties.find(self.weights, lora, self.task)
            return [] if found is None else [found]
        ties = [Tie(self.name(one, *renamed), self.name(two, *renamed)) for one, two in said.items()]
        for tie in ties:
            if tie.embedding not in self.weights:
                near = ", ".join(_files.shown(n) for n in _paths.nearest(tie.embedding, self.weights))
                raise Refusal(f"The base has no '{_files.shown(tie.embedding)}' (--tied).\n  nearest: {near}")
            if tie.head not in lora and tie.embedding not in lora:
                near = ", ".join(_files.shown(n) for n in _paths.nearest(tie.head, lora))
                raise Refusal(f"The adapter changes neither of --tied {tie.head}={tie.embedding}.\n  nearest: {near}")
        return ties

    def _resolve(self, tie: Tie, lora: dict[str, Adapter]) -> None:
        """Whether two names of one tensor stay that. If so the adapter's second update goes; if not both are written."""
        head, table = (lora.get(name) for name in tie)
        if head is not None and table is not None:
            tied = _is_same(head, table)
        else:
            tied = head is None and self._changes_both(lora, _ties.says(self.weights.config()) is not False)
        if tied:
            lora.pop(tie.head, None)
        if tied and tie.head not in self.weights:
            return
        self.sources[tie.head] = tie.embedding
        if not tied:
            self.untied = True

    def _changes_both(self, lora: Mapping[str, Adapter], tied: bool) -> bool:
        """Whether PEFT changes head and embedding together: of trained tokens, and with ``ensure_weight_tying`` under two names."""
        tables = [x for name, x in lora.items() if _ties.is_embedding(name)]
        return self.config.tying or (
            tied and bool(self.config.tokens) and any(isinstance(x, FullWeight) for x in tables)
        )

    def _complete(self, tie: Tie) -> None:
        """Where both stay one, and the base's files have both, they have one value."""
        if tie.head in self.sources and not self.untied:
            for changes in (self.low, self.full):
                if tie.embedding in changes:
                    changes[tie.head] = changes[tie.embedding]  # type: ignore[assignment]

    def _check_carried(self, renamed: tuple[str, str]) -> None:
        """PEFT writes the base's embedding beside factors for it, and loads it from there: it has to be the base's."""
        for key in self.tensors.header:
            part = part_of(key)
            name = self.source(self.name(f"{part.module}.weight", *renamed))
            if part.role != "weight" or not key.endswith(".base_layer.weight") or name not in self.weights:
                continue
            mine, theirs = self.weights.read(name), self.tensors.read(key)
            coarse = max(float(jnp.finfo(x.dtype).eps) for x in (mine, theirs))
            mine, theirs = mine.astype(np.float32), theirs.astype(np.float32)
            if mine.shape != theirs.shape or not np.allclose(mine, theirs, rtol=2 * coarse, atol=1e-6):
                raise Refusal(
                    f"The adapter carries '{_files.shown(key)}', which is not '{_files.shown(name)}' of the base.\n"
                    "  It was trained on another base, or its vocabulary was changed."
                )

    def _check_declared(self, found: Opened, renamed: tuple[str, str]) -> None:
        """The adapter has to have all that its configuration declares for what the base has."""
        new, old = renamed[1], renamed[0]
        shapes = {(old + n.removeprefix(new) if n.startswith(new) else n): t.shape for n, t in self.weights.items()}
        matrices = {n: len(shape) == 2 for n, shape in shapes.items() if len(shape) > 1}
        base = Base(set(shapes), matrices, False, {})
        declared = declared_of(self.config, self.tensors)
        declared.check_factors(base, {path for path, x in found.lora.items() if isinstance(x, LowRank)})
        declared.check_missing(base)

    def unties(self) -> bool:
        """Whether head and embedding are one in the base and two in what is merged."""
        heads = [name for name in self.added if _ties.is_head(name)]
        return self.untied or (bool(heads) and _cli_ties.tied(self.weights) is not False)

    @staticmethod
    def name(path: str, old: str, new: str) -> str:
        """The name in the model of a weight of the adapter."""
        return new + path.removeprefix(old) if path.startswith(old) else path

    def _not_there(self, lost: list[str], lora: Mapping[str, Adapter]) -> Refusal:
        first = lost[0]
        near = ", ".join(_files.shown(name) for name in _paths.nearest(first, self.weights))
        hints = [f"nearest to the first: {near}"]
        for cut in range(1, first.count(".")):
            tail = ".".join(first.split(".")[cut:])
            ends = [n for n in self.weights if n == tail or n.endswith(f".{tail}")]
            if len(ends) == 1:
                hints.append(
                    f"If these are the same: --prefix {_files.shown(first.removesuffix(tail))}={_files.shown(ends[0].removesuffix(tail))}"
                )
                break
        if all(isinstance(lora[name], FullWeight) for name in lost):
            hints.append("If the adapter brings a head that the base does not have: --add-new")
        heads = [name for name in lost if _ties.is_head(name)]
        if heads:
            hints.append(f"If the base ties it to its embedding: {_cli_ties.say_which(self.weights, heads, [])}")
        listed = _paths.listing([_files.shown(name) for name in lost], 4)
        return Refusal(f"The base lacks {len(lost)} of the adapter's weights: {listed}.\n  " + "\n  ".join(hints))

    def _put(self, path: str, name: str, adapter: Adapter) -> None:
        if name in self.low or name in self.full:
            raise Refusal(f"Two weights of the adapter are '{_files.shown(name)}' in the base.")
        source = self.source(name)
        if source in self.weights:
            have = self.weights[source]
            if not self.weights.is_float(source):
                raise Refusal(
                    f"'{_files.shown(source)}' in the base holds {have.dtype}, which nothing can be added to.\n"
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


def _is_same(one: Adapter, two: Adapter) -> bool:
    """Whether two adapters are one update, or one value, up to rounding."""
    x, y = (np.asarray(a.value if isinstance(a, FullWeight) else a.delta(None)) for a in (one, two))
    same = type(one) is type(two) and x.shape == y.shape
    return same and bool(np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(x))


def merge_safetensors(plan: Plan, out: Path, fold: Fold, force: bool, step: Step) -> Report:
    """Writes the merged model in the files of the base."""
    weights, report = plan.weights, Report(untied=plan.unties())
    name_of = {file: (file if weights.folder is not None else ONE) for file in weights.files}
    files = {name_of[file]: list(names) for file, names in weights.files.items()}
    report.added = [name for name in plan.added if name not in plan.low]
    report.replaced = [name for name in plan.full if name in weights]
    files[list(files)[-1]] += plan.added
    with new_folder(out, "safetensors", force) as part:
        sizes: dict[str, int] = {}
        for file, names in files.items():
            sizes |= _write_file(part / file, names, plan, fold, step)
        if (weights.folder is not None and (weights.folder / INDEX).exists()) or len(files) > 1:
            where = {plan.spelled(name): file for file, names in files.items() for name in names}
            _files.write_json(part / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})
        if weights.folder is not None:
            _copy_rest(weights.folder, part, set(files), fold.dtype, report)
            weights.check_standing()
    report.lost = fold.lost
    return report


def _write_file(file: Path, names: list[str], plan: Plan, fold: Fold, step: Step) -> dict[str, int]:
    """Writes one file tensor by tensor, and returns their sizes."""
    dtypes = {name: _dtype_of(plan, name, fold) for name in names}
    entries = [_entry(plan, name, dtypes[name]) for name in names]
    with open(file, "wb") as f:
        _files.write_header(f, entries)
        for name, dtype in dtypes.items():
            if dtype is None or _untouched(plan, name, dtype):
                plan.weights.copy(plan.source(name), f)
            else:
                contents = np.ascontiguousarray(_contents(plan, name, dtype, fold))
                f.write(contents.reshape(-1).view(np.uint8).data)
            step(name)
        sync(f)
    return {e.name: e.size for e in entries}


def _dtype_of(plan: Plan, name: str, fold: Fold) -> np.dtype | None:
    """Of a tensor that is written; ``None`` if it holds no floats and is copied."""
    source = plan.source(name)
    if source in plan.weights:
        return fold.dtype_of(_files.FLOATS[plan.weights[source].dtype]) if plan.weights.is_float(source) else None
    common = (_files.FLOATS[t.dtype] for t in plan.weights.values() if t.dtype in _files.FLOATS)
    return fold.dtype_of(next(common, np.dtype(np.float32)))


def _entry(plan: Plan, name: str, dtype: np.dtype | None) -> _files.Entry:
    source, spelled = plan.source(name), plan.spelled(name)
    if dtype is None:
        have = plan.weights[source]
        return _files.Entry(spelled, have.dtype, have.shape, have.size)
    shape = plan.weights[source].shape if source in plan.weights else plan.full[name].shape
    return _files.Entry(spelled, _files.SPELLED[dtype], shape, int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)


def _untouched(plan: Plan, name: str, dtype: np.dtype) -> bool:
    changed = name in plan.low or name in plan.full
    return not changed and _files.FLOATS[plan.weights[plan.source(name)].dtype] == dtype


def _contents(plan: Plan, name: str, dtype: np.dtype, fold: Fold) -> np.ndarray:
    if name in plan.full:
        return fold.stored(name, np.asarray(plan.full[name].value), dtype)
    w = plan.weights.read(plan.source(name))
    if name not in plan.low:
        return fold.stored(name, w, dtype)
    adapter, turned = plan.low[name]
    update = np.asarray(adapter.delta(None))
    return fold.added(name, w, update.swapaxes(-1, -2) if turned else update)


def _copy_rest(base: Path, to: Path, written: set[str], dtype: np.dtype | None, report: Report) -> None:
    """Configuration, tokeniser and whatever else is no weight; the base's weights in other formats are not the merged ones."""
    for path in sorted(base.iterdir()):
        if path.name in written or path.name in (INDEX, CHECKSUMS):
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
        for part in _ties.parts(found):
            part |= {key: str(dtype) for key in ("torch_dtype", "dtype") if isinstance(part.get(key), str)}
    if untied:
        _cli_ties.untie(found)
    if json.dumps(found) != before:
        file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


# --- orbax -------------------------------------------------------------------------------------------------------------


def merge_checkpoint(base: Path, adapter: Path, out: Path, fold: Fold, force: bool, begin: Any) -> Report:
    """Writes the merged parameters as an orbax checkpoint; the base is in memory, and of what is merged a leaf at a time."""
    lora = jlora.load(adapter, load_checkpoint(base, values=False))  # a base that does not fit is not read
    params = load_checkpoint(base)
    with begin(len(jax.tree.leaves(params))) as step:
        write_merged(out, params, lora, fold, overwrite=force, progress=lambda name, done, total: step(name))
    whole = [path for path in lora if isinstance(lora[path], FullWeight)]
    return Report(lost={path: x for path, x in fold.lost.items() if path not in whole}, replaced=whole)
