"""Adapters as the command line knows them: folders of jlora's own format or of PEFT's, opened, brought together and written."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

import jlora
from jlora import _files, _folders, _peft_config, _peft_files, peft
from jlora._adapters import Adapter, FullWeight, LowRank
from jlora._cli_show import Refusal
from jlora._export_tree import MARKS as CHECKPOINT
from jlora._peft_files import Files
from jlora._peft_keys import TENSORS, part_of
from jlora._sites import Site, Sites

Format = Literal["orbax", "peft"]
JSON = "adapter.json"
MARKS: Mapping[str, tuple[str, ...]] = {
    "orbax": (JSON,),
    "peft": (_peft_config.FILE,),
    "safetensors": ("model.safetensors", "model.safetensors.index.json"),
    "checkpoint": CHECKPOINT,
}
"""Of each kind of folder, files that one of it has."""
WORDS = {"orbax": "an adapter", "peft": "a PEFT adapter", "safetensors": "a model", "checkpoint": "a checkpoint"}
ABOUT = ("base_model_name_or_path", "revision", "task_type", "peft_version")


class Opened(NamedTuple):
    """An adapter that was read.

    Attributes:
        path: Its folder.
        format: Of the folder.
        lora: Adapters by path; of a PEFT adapter by PyTorch's names.
        about: What the folder says beside: the metadata of jlora's, some of the configuration of PEFT's.
        version: Of what wrote it.
        files: Of a PEFT adapter, as it was read.
    """

    path: Path
    format: Format
    lora: dict[str, Adapter]
    about: dict[str, Any]
    version: str
    files: Files | None = None


def format_of(path: Path) -> Format:
    """Which kind of adapter there is at ``path``."""
    path = _folders.standing(path)
    if not path.is_dir():
        raise Refusal(f"There is no adapter at {path}: {'it is no folder' if path.exists() else 'nothing is there'}.")
    if (path / JSON).exists():
        return "orbax"
    if (path / _peft_config.FILE).exists() or (path / TENSORS).exists():
        return "peft"
    what = next((WORDS[kind] for kind in ("safetensors", "checkpoint") if _has(path, kind)), "")
    raise Refusal(
        f"There is no adapter at {path}: neither {JSON} (jlora) nor {_peft_config.FILE} (PEFT) is there."
        + (f"\n  It is {what}; an adapter is only what was trained beside one." if what else "")
    )


def _has(path: Path, kind: str) -> bool:
    return any((path / mark).exists() for mark in MARKS[kind])


def open_adapter(
    path: Path, values: Mapping[str, Any] | None = None, without: Collection[str] = (), files: Files | None = None
) -> Opened:
    """Reads an adapter of either format, all of it checked.

    Args:
        path: Its folder.
        values: Of the base, under PyTorch's names.
        without: Tensors of PEFT's to leave out.
        files: Of PEFT's, if they are open already.
    """
    path = _files.folder(path)
    files = files or open_files(path)
    if files is not None:
        lora, _ = peft._read(files, {} if values is None else values, without=without)
        about = {name: files.about[name] for name in ABOUT if isinstance(files.about.get(name), str)}
        return Opened(path, "peft", lora, about, f"PEFT {about.get('peft_version', '')}".strip(), files)
    description = jlora.metadata(path)
    meta = description.get("meta")
    about = dict(meta) if isinstance(meta, dict) else {}
    return Opened(path, "orbax", jlora.load(path), about, f"jlora {_files.shown(description.get('jlora', ''))}")


def open_files(path: Path) -> Files | None:
    """The files of an adapter, if it is PEFT's."""
    path = _files.folder(path)
    return _peft_files.open_adapter(path) if format_of(path) == "peft" else None


def check_same_format(paths: Sequence[Path]) -> Format:
    """The format of all of these adapters."""
    found = {path: format_of(_files.folder(path)) for path in paths}
    if len(set(found.values())) > 1:
        kinds = ", ".join(f"{path.name} is {form}" for path, form in found.items())
        raise Refusal(f"All adapters must be of one format: {kinds}.\n  jlora convert makes one of the other.")
    return next(iter(found.values()))


def open_several(paths: Sequence[Path], values: Mapping[str, Any] | None = None) -> list[Opened]:
    """Reads adapters of one format for one base."""
    found = [open_adapter(path, values) for path in paths]
    bases = [next(iter(x.lora.values())).base for x in found]
    for x, base in zip(found, bases, strict=True):
        difference = bases[0].difference(base)
        if difference:
            raise Refusal(
                f"The adapters at {found[0].path} and {x.path} are for different bases: {_files.shown(difference, 200)}."
            )
    return found


class Writing(NamedTuple):
    """How an adapter is to be written."""

    force: bool = False
    dtype: str | None = None
    rank_pattern: bool = False
    base_model: str | None = None
    task_type: str | None = None


def write(out: Path, like: Opened, how: Writing) -> None:
    """Writes ``like.lora`` in its format, complete or not at all."""
    if like.format == "peft":
        peft.save(
            out,
            like.lora,
            names=lambda path: path,
            base_model=how.base_model or like.about.get("base_model_name_or_path"),
            task_type=how.task_type or like.about.get("task_type"),
            dtype=how.dtype,
            portable=not how.rank_pattern,
            overwrite=how.force,
        )
        return
    lora = like.lora if how.dtype is None else {p: _cast(x, how.dtype) for p, x in like.lora.items()}
    with new_folder(out, "orbax", how.force) as part:
        jlora.save(part, lora, **like.about)


def changed(x: Adapter, **fields: Any) -> Adapter:
    """``x`` with other fields: adapters are dataclasses."""
    return replace(x, **fields)  # type: ignore[type-var]


def at_rate(lora: Mapping[str, Adapter], rate: float | None) -> dict[str, Adapter]:
    """The adapters with another rate of dropout."""
    if rate is None:
        return dict(lora)
    if not 0 <= rate < 1:
        raise Refusal(f"--dropout takes a rate from 0 up to, not including, 1.\n  got: {rate}")
    return {path: changed(x, dropout=rate) if isinstance(x, LowRank) else x for path, x in lora.items()}


def _cast(x: Adapter, dtype: str) -> Adapter:
    return changed(x, **{name: array.astype(dtype) for name, array in x.arrays().items()})


@contextmanager
def new_folder(out: Path, kind: str, force: bool) -> Iterator[Path]:
    """A folder beside ``out`` that becomes it when the block ends well."""
    with _folders.new_folder(out, overwrite=force, marks=MARKS[kind], what=WORDS[kind]) as part:
        yield part


def free(out: Path, kind: str, force: bool, inputs: Sequence[Path]) -> Path:
    """``out``, if something of this kind may be written there: before the work begins."""
    out = _files.folder(out)
    for path in inputs:
        read = _files.folder(path).resolve()
        if read.is_relative_to(out.resolve()):
            raise Refusal(f"{path} would be replaced while it is read.\n  Choose another name than {out}.")
        if out.resolve().is_relative_to(read):
            raise Refusal(f"{out} lies inside {path}, which is only read.\n  Choose a name beside it.")
    _folders.check_free(out, overwrite=True, marks=MARKS[kind], what=WORDS[kind])
    if not force and out.exists() and any(out.iterdir()):
        raise Refusal(f"There is already {WORDS[kind]} at {out}.\n  Choose another name, or replace it with --force.")
    return out


# --- What convert has to know ------------------------------------------------------------------------------------------


def names_of(file: Path | None) -> dict[str, Any] | None:
    """The table of names in a JSON file, as ``jlora.peft.load`` takes it."""
    if file is None:
        return None
    return {path: _named(file, path, value) for path, value in _files.read_json(file).items()}


def _named(file: Path, path: str, value: Any) -> Any:
    if isinstance(value, str):
        return peft.Weight(value)
    if isinstance(value, list):
        return [_named(file, path, x) for x in value]
    words, numbers = ("name", "layout", "transposed"), ("rotary_heads", "nesting")
    wanted: dict[str, type] = dict.fromkeys(words, str) | dict.fromkeys(numbers, int) | {"is_transposed": bool}
    ok = isinstance(value, dict) and "name" in value and set(value) <= set(wanted)
    if not ok or any(type(x) is not wanted[k] for k, x in value.items()):
        raise Refusal(
            f"'{_files.shown(path)}' in {file} must be a name, a list of them, or an object with {', '.join(wanted)}.\n"
            f"  got: {_files.shown(value)}"
        )
    if value.get("rotary_heads", 1) < 1:
        raise Refusal(f"rotary_heads of '{_files.shown(path)}' in {file} must be at least 1.")
    return peft.Weight(**value)


def sites_like(path: Path) -> Sites:
    """The sites of a base, as far as one of jlora's adapters for it knows them."""
    if format_of(path) != "orbax":
        raise Refusal(
            f"--like takes one of jlora's own adapters, which knows the axes of its base.\n  got: PEFT's {path}"
        )
    target = jlora.restore_target(jlora.metadata(path))
    base = next(iter(target.values())).base
    found = []
    for leaf, shape, dtype in base.leaves:
        adapter = target.get(leaf)
        if isinstance(adapter, LowRank) and not adapter.use:
            raise Refusal(
                f"{path} was saved by a jlora that did not keep how '{_files.shown(leaf)}' is used: save it again."
            )
        if isinstance(adapter, LowRank | FullWeight) and adapter.use:
            roles = adapter.inputs, adapter.outputs, adapter.batch
            more: dict[str, Any] = {"window": adapter.window, "groups": adapter.groups}
            more["reason"] = "" if all(roles[:2]) else f"{path.name} (--like) has it whole, and nothing multiplies it"
            found.append(Site(leaf, shape, jnp.dtype(dtype), adapter.use, *roles, **more))
        else:
            reason = f"{path.name} (--like) does not adapt it, so that its axes are not known"
            found.append(Site(leaf, shape, jnp.dtype(dtype), "", reason=reason))
    return Sites(found, base)


def needs_values(files: Files) -> bool:
    """Whether a PEFT adapter has more than factors: whole weights are compared with the base, rows are put into it."""
    return any(part_of(key).role not in ("a", "b") for key in files.tensors.header)


def ranks_in_file(lora: Mapping[str, Adapter], form: Format, rank_pattern: bool) -> dict[str, int]:
    """The ranks of factors as ``write`` leaves them: PEFT's are padded to one."""
    ranks = {path: x.rank for path, x in lora.items() if isinstance(x, LowRank)}
    return dict.fromkeys(ranks, max(ranks.values())) if ranks and form == "peft" and not rank_pattern else ranks


class Added(NamedTuple):
    """What a PEFT adapter has of something that only the base has whole: ``rows`` of a table, or what is added to a ``bias``."""

    name: str
    use: str
    shape: tuple[int, ...]


def added(files: Files | None) -> dict[str, Added]:
    """By their keys, the tensors of an adapter that are changes of what the base has."""
    if files is None:
        return {}
    header = files.tensors.header
    parts = {key: part_of(key) for key in header}
    own = {part.module for part in parts.values() if part.role == "bias"}  # has the bias that B's is added to
    found = {}
    for key, part in parts.items():
        if part.role == "tokens":
            found[key] = Added(part.name, "rows", header[key].shape)
        elif part.role == "b_bias" and part.module not in own:
            found[key] = Added(f"{part.module}.bias", "bias", header[key].shape)
    return found


def parameters(x: Adapter) -> int:
    """The number of parameters of an adapter."""
    return sum(int(np.prod(array.shape, dtype=np.int64)) for array in x.arrays().values())
