"""Saving and loading adapters: orbax for the arrays, a small JSON beside them for what they mean.

Layout of a saved adapter::

    adapter/
        adapter.json       written last, by an atomic rename: what it names is complete
        arrays-<id>/       an orbax checkpoint: the arrays of each adapter, and nothing of the base

So a save that fails or is killed leaves the last good adapter as it was, and whoever reads sees the old one or the new one.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jlora import _claims, _files, _folders, _hosts, _rename
from jlora._adapters import Adapter
from jlora._describe import describe, restore_target
from jlora._stored import Arrays, check_plain, sha256
from jlora._text import shown

_JSON = "adapter.json"
_ORBAX = threading.Lock()  # checkpointers in several threads of a process remove each other's folders
_MADE = re.compile(rf"(?:arrays-|\.{re.escape(_JSON)}\.)([0-9a-f]{{12}})(?:\.orbax-checkpoint-tmp.*)?")
"""Names of what a save makes; whatever else is in the folder is not its own. Orbax writes beside the arrays first, under a longer name."""
_TRIES = 10  # of a load while others save


def save(path: str | os.PathLike[str], lora: Mapping[str, Adapter], *, overwrite: bool = False, **meta: Any) -> None:
    """Saves an adapter, and only it, as a folder.

    With several processes all of them call it, with the same adapter: each writes its own part of it.

    Args:
        path: The folder; with several processes one that all of them see.
        lora: Adapters by path.
        overwrite: Replace an adapter that is already there. The old one stays until the new one is complete; other files in the folder
            stay.
        **meta: Anything JSON can hold, kept beside the arrays; ``jlora.metadata`` reads it.

    Raises:
        FileExistsError: there is something at ``path`` and ``overwrite`` was not said; or it is no adapter.
        TypeError: ``meta`` is not JSON.
        ValueError: an array is not finite, ``lora`` is no adapter, or processes have different ones; raised on all of them.
        OSError: the disk is full or cannot be written; what was there is unchanged. Or the new one is in place, which the message then
            says, and the file system does not confirm that it would outlive a loss of power.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, jlora
        >>> def model(params, x):
        ...     return jnp.tanh(x @ params["up"]) @ params["down"]
        >>> params = {"up": jnp.ones((3, 5)), "down": jnp.ones((5, 2))}
        >>> found = jlora.sites(model, params, jnp.ones((7, 3)))
        >>> lora = jlora.init(jax.random.key(0), params, found, jlora.LoRA(rank=2))
        >>> folder = tempfile.mkdtemp() + "/adapter"
        >>> jlora.save(folder, lora, task="demo")
        >>> again = jlora.load(folder, params)
        >>> bool((again["up"].a == lora["up"].a).all()), jlora.metadata(folder)["meta"]
        (True, {'task': 'demo'})
    """
    path = _same_folder(path)
    description = _checked(lora, meta)
    _hosts.first(lambda: _check_free(path, overwrite))
    name = _hosts.first(lambda: f"arrays-{uuid.uuid4().hex[:12]}")
    arrays = path / name
    with contextlib.ExitStack() as held, contextlib.ExitStack() as undo:
        undo.callback(lambda: _discard(path, name) if _hosts.is_first() else None)
        _hosts.first(lambda: _claim(path, name, held))
        _write_arrays(arrays, lora)
        _hosts.first(lambda: _write_description(path, name, description, overwrite))
        undo.pop_all()
    _hosts.first(lambda: _sweep(path, name))


def _part(path: Path, arrays: str) -> Path:
    """The description that will belong to some arrays. It is held by the save that writes them, from before there are any."""
    return path / f".{_JSON}.{arrays.removeprefix('arrays-')}"


def _claim(path: Path, arrays: str, held: contextlib.ExitStack) -> None:
    """Tells other saves, as long as this one lives, that these arrays are not to be removed."""
    for left in reversed(range(_TRIES)):
        path.mkdir(parents=True, exist_ok=True)
        try:
            held.enter_context(_claims.claim(_part(path, arrays)))
            return
        except FileNotFoundError:  # a save that failed took the empty folder away
            if not left:
                raise


def _checked(lora: Mapping[str, Adapter], meta: dict[str, Any]) -> dict[str, Any]:
    """The description of an adapter that can be saved; several processes must have the same."""
    found: dict[str, Any] = {}

    def check() -> None:
        found.update(describe(lora, **meta))
        _check_length(found)
        for leaf_path, adapter in lora.items():
            for name, x in adapter.arrays().items():
                _check_array(f"'{leaf_path}'.{name}", x)

    _hosts.together(check)
    arrays = [x for _, a in sorted(lora.items()) for x in a.arrays().values()]
    whole = [x for x in arrays if _hosts.is_local(x) or (_hosts.spans(x) and x.is_fully_replicated)]
    _hosts.agree("the adapter", [json.dumps(found, sort_keys=True), *(_hosts.pieces(x)[0] for x in whole)])
    return found


def _same_folder(path: Any) -> Path:
    """``path`` as a folder, the same on every process."""
    found: list[Path] = []
    _hosts.together(lambda: found.append(_folder(path)))
    _hosts.agree("the folder", [str(found[0])])
    return found[0]


def _check_length(description: Mapping[str, Any]) -> None:
    """Raises if ``load`` would not read the description: a quarter of what it reads is left for the digests of files."""
    length, limit = len(json.dumps(description, indent=1)), _files.MAX_JSON * 3 // 4
    if length > limit:
        raise ValueError(
            f"The description of the adapter would have {length:,} bytes, more than the {limit:,} it may have.\n"
            "  Keep large metadata in files of your own."
        )
    if not _files.is_shallow(description):
        raise ValueError(
            f"The metadata is nested more than {_files.MAX_DEPTH - 1} levels deep: load would not read it."
        )


def _check_precision(lora: Mapping[str, Adapter]) -> None:
    """Raises if JAX would cut arrays of the adapter to half their bits."""
    for path, adapter in lora.items():
        for name, x in adapter.arrays().items():
            if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
                raise ValueError(
                    f"'{shown(path)}'.{shown(name)} was saved in {x.dtype}, which JAX has not here: it would be cut to "
                    f"{jax.dtypes.canonicalize_dtype(x.dtype)}.\n"
                    "  Set JAX_ENABLE_X64=1, or load it inside `with jax.enable_x64(True):` and cast it."
                )


def _check_array(name: str, x: Any) -> None:
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"save cannot run inside a transformation such as jit: {shown(name)} is a tracer.")
    for piece in _hosts.pieces(x):
        if not bool(np.isfinite(piece.astype(np.float32) if piece.dtype.itemsize < 4 else piece).all()):
            raise ValueError(f"{shown(name)} is not finite: the adapter is not saved.\n  The last good one is kept.")


def _write_description(path: Path, arrays: str, description: dict[str, Any], overwrite: bool) -> None:
    files = {name: _record(file) for name, file in _files_of(path / arrays).items()}
    described = description | {"arrays": arrays, "files": files}
    part = _part(path, arrays)
    _write_json(part, described | {"digest": _digest(described)})
    _put(part, path / _JSON, overwrite)


def load(path: str | os.PathLike[str], params: Any = None) -> dict[str, Adapter]:
    """Loads an adapter. With several processes all of them call it.

    If it is overwritten meanwhile, the new one is loaded. With several processes that is an error: load it again.

    Args:
        path: The folder ``save`` wrote.
        params: The base, or ``jax.ShapeDtypeStruct``s of it. If given, it must be the tree the adapter was made for, leaf by leaf, and
            the factors are placed as its shardings imply. Without it, ``apply`` and ``merge`` still check the adapted leaves.

    Returns:
        What was saved: the same arrays bit for bit, and the same structure.

    Raises:
        FileNotFoundError: there is no complete adapter at ``path``.
        ValueError: a file is missing, truncated or damaged; ``params`` is another base (the first difference is named); the arrays
            have 64 bits and JAX here has 32.
    """
    folder = _same_folder(path)
    for _ in range(_TRIES - 1 if _hosts.count() == 1 else 0):
        before = _current(folder)
        try:
            return _load(_folders.standing(folder), params)
        except (ValueError, OSError, KeyError):  # as of files that a save removed, for which orbax has several
            if before == _current(folder):
                raise
    return _load(_folders.standing(folder), params)


def _load(folder: Path, params: Any) -> dict[str, Adapter]:
    target: dict[str, Adapter] = {}
    found: dict[str, Any] = {}
    read: dict[str, dict[str, Any]] = {}
    stored: list[Arrays] = []

    def check() -> None:
        found.update(metadata(folder))
        target.update(restore_target(found, params))
        stored.append(_open(folder, found, target))
        _check_precision(target)

    def fill() -> None:
        for i, (leaf_path, adapter) in enumerate(sorted(target.items())):
            read[leaf_path] = {
                name: stored[0].read(f"{_key(i)}.{name}", x.sharding, f"{leaf_path}.{name}")
                for name, x in adapter.arrays().items()
            }

    _hosts.together(check)
    _hosts.agree("the adapter to load", [json.dumps(found, sort_keys=True)])
    _hosts.together(fill)
    return {
        leaf_path: jax.tree.unflatten(jax.tree.structure(adapter), [read[leaf_path][name] for name in adapter.labels])
        for leaf_path, adapter in sorted(target.items())
    }


def metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON of a saved adapter: ``format``, ``jlora`` (version), ``adapters`` (rules leaf by leaf), ``base``, ``meta``.

    Raises:
        FileNotFoundError: there is no complete adapter at ``path``.
        ValueError: the JSON is damaged.
    """
    file = _folders.standing(_folder(path)) / _JSON
    if not os.path.lexists(file):
        raise FileNotFoundError(
            f"There is no adapter at {file.parent}: it has no {_JSON}.\n  Pass the folder that jlora.save wrote."
        )
    check_plain(file, file.lstat())
    try:
        return _files.read_json(file)
    except ValueError as error:
        raise ValueError(f"{error}\n  It is damaged or was not written by jlora.") from None


def _key(index: int) -> str:
    # Paths hold any character; orbax makes its own keys of these names.
    return f"{index:05d}"


def _as_tree(lora: Mapping[str, Adapter]) -> dict[str, dict[str, Any]]:
    return {_key(i): adapter.arrays() for i, (_, adapter) in enumerate(sorted(lora.items()))}


def _written_once(x: Any) -> Any:
    """What orbax saves: of an array that every process has for itself, one copy."""
    return np.asarray(x) if _hosts.is_local(x) else x


def _write_arrays(folder: Path, lora: Mapping[str, Adapter]) -> None:
    import orbax.checkpoint as ocp  # here, so that `import jlora` stays quick

    try:
        with _ORBAX, ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, jax.tree.map(_written_once, _as_tree(lora)))
            checkpointer.wait_until_finished()
    except (ValueError, OSError) as error:  # the storage below reports a full disk as a ValueError
        raise OSError(
            f"The adapter could not be saved at {folder.parent}; what was there before is unchanged.\n  {error}"
        ) from error


def _folder(path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"The folder of the adapter comes first: save(path, lora), load(path, params).\n  got: {type(path).__name__} as path"
        )
    return Path(os.path.abspath(os.path.expanduser(path)))


def _digest(description: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()


def _files_of(folder: Path) -> dict[str, Path]:
    """The regular files in a folder and below, by their path in it."""
    return {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}


def _record(file: Path) -> list[Any]:
    """Size and digest of a file, which is not in memory as a whole."""
    return [file.stat().st_size, sha256(file)]


def _open(folder: Path, description: Mapping[str, Any], target: Mapping[str, Adapter]) -> Arrays:
    """The arrays that a description lists, their files checked."""
    files, name = description.get("files"), description.get("arrays")
    if not isinstance(files, dict) or not files or not re.fullmatch(r"arrays-\w+", str(name)):
        raise ValueError(f"The description in {folder / _JSON} is damaged: it names no files.")
    arrays = folder / str(name)
    if not os.path.lexists(arrays):
        raise ValueError(f"The adapter at {folder} is damaged: the folder {shown(name)} is missing.")
    check_plain(arrays, arrays.lstat())
    if description.get("digest") != _digest({k: v for k, v in description.items() if k != "digest"}):
        raise ValueError(f"{folder / _JSON} is damaged: it was changed after it was written.")
    expected = {f"{key}.{n}": x for key, found in _as_tree(target).items() for n, x in found.items()}
    return Arrays(arrays, files, expected)


def _write_json(file: Path, description: Mapping[str, Any]) -> None:
    with open(file, "w", encoding="utf-8") as f:
        json.dump(description, f, indent=1)
        f.flush()
        os.fsync(f.fileno())


def _put(part: Path, file: Path, overwrite: bool) -> None:
    """Gives ``part`` the name ``file``, which is either as before or complete, also if the machine stops."""
    try:
        if overwrite or not _rename.rename_new(part, file):
            _check_free(file.parent, overwrite)
            os.replace(part, file)
    except FileExistsError:  # another save was faster
        _check_free(file.parent, overwrite)
        raise
    try:
        _folders.sync_folder(file.parent)
    except OSError as error:
        raise OSError(
            f"The adapter at {file.parent} is the new one, but may not outlive a loss of power: {error}.\n"
            "  The arrays of the one before are kept beside it until the next save."
        ) from error


def _check_free(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not path.is_dir() or not ((path / _JSON).exists() or _is_remains(path)):
        raise FileExistsError(f"{shown(path)} is not an adapter: it is left alone.\n  Choose another folder.")
    if (path / _JSON).exists() and not overwrite:
        raise FileExistsError(
            f"There is already an adapter at {shown(path)}.\n  Choose another folder, or replace it with save(..., overwrite=True)."
        )


def _is_remains(path: Path) -> bool:
    """Whether a folder is empty, or holds only what a killed save left."""
    return all(_MADE.fullmatch(p.name) for p in path.iterdir())


def _discard(path: Path, arrays: str) -> None:
    """Removes what a failed save left, unless it came as far as to replace the adapter: what that names is never removed."""
    if not path.is_dir() or _current(path) == arrays:
        return
    _remove(path, arrays)
    if not any(path.iterdir()):
        path.rmdir()


def _current(path: Path) -> Any:
    """The arrays of the adapter that is there, if it can be read: a save replaces it whole, and what is damaged is none of this one."""
    try:
        return metadata(path).get("arrays")
    except (FileNotFoundError, ValueError):
        return None


def _sweep(path: Path, keep: str) -> None:
    """Removes what earlier saves left: arrays that were replaced, and remains of killed saves; what others are saving stays."""
    names = {f"arrays-{match[1]}" for match in map(_MADE.fullmatch, os.listdir(path)) if match}
    for arrays in sorted(names - {keep}):
        with _claims.unclaimed(_part(path, arrays)) as dead:
            # Read last: a save that was alive a moment ago may have become the current one.
            if dead and _current(path) != arrays:
                _remove(path, arrays)


def _remove(path: Path, arrays: str) -> None:
    """Removes what the save of some arrays made, first of all these."""
    number = arrays.removeprefix("arrays-")
    found = [p for p in path.iterdir() if (match := _MADE.fullmatch(p.name)) and match[1] == number]
    for path in sorted(found, key=lambda p: p.name.startswith(".")):
        if not path.is_dir():
            path.unlink(missing_ok=True)
            continue
        # Threads of orbax may write on for a moment after a save has failed, into a folder that is being removed.
        for wait in (0.0, 0.1, 0.5, 1.0):
            time.sleep(wait)
            shutil.rmtree(path, ignore_errors=True)
            if not path.exists():
                break
