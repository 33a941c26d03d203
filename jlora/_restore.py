"""Trees of arrays that orbax wrote, from a folder that may be anyone's: what they take is bounded by what is said of the arrays.

They are not read with orbax, for the reasons of decision 8. Of a tree from elsewhere there is no list of files and no digest; what is
checked is all that can be: each file is a regular one of the folder, each node is unpacked under a budget, and each chunk only if it
fits its array. All of that but the contents of chunks is checked before the first array is allocated.
"""

import os
import stat
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jlora import _files, _folders
from jlora._ocdbt import MANIFEST, Damaged, Piece, Store, read
from jlora._stored import MAX_BYTES, check_plain, entries_in
from jlora._zarr import MAX_SAID, Form, form_of, said_at

TREE = "_METADATA"
"""The file that says which tree it is."""
_BESIDE, _PER_LEAF = 32 * 2**20, 32 * 2**10  # what nodes may take, as for an adapter
_LONGEST_KEY = 4096
_MAX_SAID = 64 * 2**20
_LEFT_OUT = 2**30  # bytes of zeros, which orbax did not always write
_EMPTY: Mapping[str, Callable[[], Any]] = {"Dict": dict, "List": list, "Tuple": tuple, "None": lambda: None}


class _Leaf(NamedTuple):
    """What is said of a leaf, or of a node with nothing in it."""

    path: tuple[str | int, ...]
    kind: str
    is_empty: bool

    @property
    def name(self) -> str:
        return ".".join(map(str, self.path))


def _leaf(keys: Any, value: Any) -> _Leaf:
    path = tuple(int(key["key"]) if key["key_type"] == 1 else str(key["key"]) for key in keys)
    return _Leaf(path, str(value["value_type"]), bool(value["skip_deserialize"]))


class Checkpoint:
    """A tree of arrays in a folder that orbax wrote. All but the contents is checked when this is made.

    Args:
        folder: The folder.

    Attributes:
        shapes: The tree, of ``jax.ShapeDtypeStruct``. Dtypes are those that JAX has: without ``jax_enable_x64``, of 32 bits at most.

    Raises:
        ValueError: it is no tree of arrays, a file is a link or a pipe, or what is said of the arrays does not fit what is there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._sizes, self._odd = _files_in(folder)
        for name in self._odd:
            if _folders.CHECKPOINT.fullmatch(name.split("/")[0]):
                self._check_file(name)
        if TREE not in self._sizes:
            raise self._unfit(f"there is no {TREE}")
        about = _files.read_json(folder / TREE, _MAX_SAID)
        self._sparse = about.get("store_array_data_equal_to_fill_value") is not True
        self._leaves = self._said(about.get("tree_metadata"))
        try:
            self._store = self._opened(about)
            self._forms = {leaf.name: self._form(leaf.name) for leaf in self._leaves if not leaf.is_empty}
            self._check_chunks()
        except Damaged as error:
            raise self._damaged(error) from None
        self._random = self._random_keys()
        self.shapes = self._tree(self._shape)

    def read(self, place: Callable[[Any], Any]) -> Any:
        """The tree. Arrays are read one by one, and what ``place`` makes of each is kept."""

        def made(name: str) -> Any:
            form = self._forms[name]
            try:
                x = place(form.read(lambda key: self._chunk(name, key), name, [(0, n) for n in form.shape]))
            except Damaged as error:
                raise self._damaged(error) from None
            return jax.random.wrap_key_data(x, impl=self._random[name]) if name in self._random else x

        return self._tree(made)

    def _shape(self, name: str) -> jax.ShapeDtypeStruct:
        form = self._forms[name]
        like = jax.ShapeDtypeStruct(form.shape, jax.dtypes.canonicalize_dtype(form.dtype))
        if name not in self._random:
            return like
        try:
            return jax.eval_shape(lambda x: jax.random.wrap_key_data(x, impl=self._random[name]), like)
        except (TypeError, ValueError) as error:
            raise self._damaged(f"'{_files.shown(name)}' is no random key ({_files.shown(error)})") from None

    # --- The tree -----------------------------------------------------------------------------------------------------

    def _said(self, entries: Any) -> list[_Leaf]:
        """The leaves; raises unless they are arrays, or empty nodes."""
        try:
            found = [_leaf(entry["key_metadata"], entry["value_metadata"]) for entry in entries.values()]
        except (KeyError, TypeError, AttributeError, ValueError):
            raise self._damaged(f"{TREE} is not what orbax writes") from None
        for leaf in found:
            if leaf.kind == "string" if not leaf.is_empty else leaf.kind not in _EMPTY:
                raise self._unfit(f"'{_files.shown(leaf.name)}' is a {_files.shown(leaf.kind)}, beside arrays")
        if all(leaf.is_empty for leaf in found):
            raise self._unfit("it holds no arrays")
        inner = {leaf.path[:i] for leaf in found for i in range(len(leaf.path))}
        return [x for x in found if not (x.is_empty and x.path in inner)]  # orbax leaves there what a node was before

    def _tree(self, made: Callable[[str], Any]) -> Any:
        """The tree with a value for the name of each array."""
        top: dict[Any, Any] = {}
        for leaf in self._leaves:
            value = _Value(_EMPTY[leaf.kind]() if leaf.is_empty else made(leaf.name))
            *path, last = ("", *leaf.path)  # with a name for the tree as a whole, which may be one array
            at = top
            for key in path:
                at = at.setdefault(key, {})
                if isinstance(at, _Value):
                    raise self._damaged(f"'{_files.shown(leaf.name)}' lies in an array")
            if at.setdefault(last, value) is not value:
                raise self._damaged(f"'{_files.shown(leaf.name)}' is there twice")
        return self._node(top[""])

    def _node(self, x: Any) -> Any:
        """A node, whose keys are numbers if it is a list."""
        if isinstance(x, _Value):
            return x.value
        numbers = [key for key in x if isinstance(key, int)]
        if not numbers:
            return {key: self._node(value) for key, value in x.items()}
        if len(numbers) != len(x) or sorted(numbers) != list(range(len(x))):
            raise self._damaged("the parts of a list are not numbered one after another")
        return [self._node(x[i]) for i in range(len(x))]

    # --- The arrays ---------------------------------------------------------------------------------------------------

    def _opened(self, about: Mapping[str, Any]) -> Any:
        """The store of the arrays."""
        said = about.get("use_ocdbt")
        if not (MANIFEST in self._sizes if said is None else said):
            return _Plain(self.folder, self._sizes, self._check_file)
        total = sum(self._sizes.values())
        budget = min(_BESIDE + _PER_LEAF * len(self._leaves) + 2 * total, 2**31)
        return Store(self.folder, self._sizes, budget, _LONGEST_KEY)

    def _form(self, name: str) -> Form:
        """How an array is stored."""
        for version in (2, 3):
            key = _key(name, said_at(version))
            if key not in self._store:
                continue
            form = form_of(self._store[key], version) if self._store.size(key) <= MAX_SAID else None
            if form is None:
                said = _files.shown(self._store[key].decode("latin-1"), 300)
                raise Damaged(f"'{_files.shown(name)}' is stored in a way that orbax does not use\n  got: {said}")
            return form
        raise Damaged(f"'{_files.shown(name)}' is missing")

    def _check_chunks(self) -> None:
        """Raises unless all chunks are there, or few enough that are all zeros were left out."""
        total = sum(form.nbytes for form in self._forms.values())
        if total > MAX_BYTES:
            raise Damaged(f"its arrays are to have {total:,} bytes; at most {MAX_BYTES:,} are read")
        free = _LEFT_OUT if self._sparse else -1
        for name, form in self._forms.items():
            if prod(form.grid) > len(self._store) + 2**16:
                raise Damaged(f"'{_files.shown(name)}' is to have {prod(form.grid):,} chunks, and most are missing")
            for key in form.chunks():
                if _key(name, key) not in self._store:
                    free -= prod(form.chunk) * form.dtype.itemsize
                    if free < 0:
                        raise Damaged(f"{_files.shown(_key(name, key))} is missing")

    def _chunk(self, name: str, key: str) -> bytes | None:
        key = _key(name, key)
        if key not in self._store:
            return None
        found: bytes = self._store[key]
        return found

    def _random_keys(self) -> dict[str, str]:
        """How the keys among the arrays are made into random bits."""
        found: dict[str, str] = {}
        for file in sorted(self._sizes):
            if not file.startswith("array_metadatas/"):
                continue
            entries = _files.read_json(self.folder / file, _MAX_SAID).get("array_metadatas")
            for entry in entries if isinstance(entries, list) else ():
                try:
                    about = entry["array_metadata"]
                    impl = (about["ext_metadata"] or {}).get("random_key_impl")
                    if impl is not None and about["param_name"] in self._forms:
                        found[about["param_name"]] = str(impl)
                except (KeyError, TypeError, AttributeError):
                    raise self._damaged(f"{_files.shown(file)} is not what orbax writes") from None
        return found

    # --- Errors -------------------------------------------------------------------------------------------------------

    def _check_file(self, name: str) -> None:
        """Raises if a file, or a folder that it would be in, is a link or a pipe."""
        for at in (name, *map(str, Path(name).parents)) if self._odd else ():
            if at in self._odd:
                check_plain(self.folder / at, self._odd[at])

    def _unfit(self, what: str) -> ValueError:
        return ValueError(f"The checkpoint at {self.folder} is no tree of parameters: {what}.")

    def _damaged(self, what: Any) -> ValueError:
        return ValueError(
            f"The checkpoint at {self.folder} is damaged: {what}.\n  Copy or download it again, or save it again with orbax."
        )


class _Value:
    def __init__(self, value: Any):
        self.value = value


class _Plain:
    """A store whose keys are files."""

    def __init__(self, folder: Path, sizes: Mapping[str, int], check: Callable[[str], None]):
        self._folder, self._sizes, self._check = folder, sizes, check

    def __contains__(self, key: str) -> bool:
        self._check(key)
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, key: str) -> bytes:
        return read(self._folder, self._sizes, Piece(key, 0, self._sizes[key]))

    def size(self, key: str) -> int:
        """The size of a value."""
        return self._sizes[key]


def _key(name: str, key: str) -> str:
    return f"{name}/{key}" if name else key


def _files_in(folder: Path) -> tuple[dict[str, int], dict[str, os.stat_result]]:
    """The sizes of the files in a folder and below, and what is neither a file nor a folder."""
    sizes: dict[str, int] = {}
    odd: dict[str, os.stat_result] = {}
    for name, about in entries_in(folder, lambda name: True):
        if stat.S_ISREG(about.st_mode):
            sizes[name] = about.st_size
        else:
            odd[name] = about
    return sizes, odd
