"""The files of a PEFT adapter, opened together and checked: what one save wrote, whatever then takes its place."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jlora import _checksums, _files, _folders, _peft_config, _peft_spelling
from jlora._peft_config import Config
from jlora._peft_keys import TENSORS
from jlora._text import counted

MAX_KEY, MAX_DEPTH = 1000, 64  # letters in the name of a tensor, and parts between its dots


class Files(NamedTuple):
    """The two files of an adapter: they belong together, whatever is saved at their place after they were opened.

    Attributes:
        config: What of the configuration matters.
        tensors: The file of tensors, open.
        about: All that the configuration says.
    """

    config: Config
    tensors: _files.Safetensors
    about: Mapping[str, Any]


def open_adapter(folder: Path) -> Files:
    """Opens and checks what one adapter consists of."""
    return _folders.steady(folder, _open_adapter)


def _open_adapter(folder: Path) -> Files:
    sums = _checksums.read(folder)
    about = _peft_config.content_of(folder, sums.of(_peft_config.FILE))
    return Files(_peft_config.read(folder, about), _open_tensors(folder, sums.of(TENSORS)), about)


def _open_tensors(folder: Path, digest: str = "") -> _files.Safetensors:
    """The checked file of an adapter's tensors, whose SHA-256 is ``digest`` if that is known."""
    file = folder / TENSORS
    if not file.exists():
        pickled = [name for name in ("adapter_model.bin", "adapter_model.pt") if (folder / name).exists()]
        hint = (
            f"\n  {pickled[0]} is a pickle, which can run anything and is never read: save it again with PEFT, which writes safetensors."
            if pickled
            else ""
        )
        raise FileNotFoundError(f"There is no PEFT adapter at {folder}: it has no {TENSORS}.{hint}")
    tensors = _files.Safetensors(file, digest=digest)
    for key in tensors.header:
        if len(key) > MAX_KEY or key.count(".") >= MAX_DEPTH:
            raise ValueError(
                f"{file} has a tensor '{_files.shown(key, 60)}' whose name has {counted(len(key), 'letter')} in "
                f"{counted(key.count('.') + 1, 'part')}; "
                f"no module is named like that, and at most {MAX_KEY:,} in {MAX_DEPTH} are read."
            )
    tensors.header = _peft_spelling.as_peft(file, tensors.header)
    return tensors
