"""Other spellings of a PEFT adapter's keys: those of wrappers, and of dumps that were not saved by PEFT. All of a file has one.

``torch.compile`` and FSDP put words into names, DDP one before them; ``state_dict()`` has the adapter's name inside; and who saved the
model in the wrapper has no prefix, or two.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

from jlora import _files
from jlora._peft_keys import PREFIX

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Words that torch.compile, FSDP and checkpointing put into names: no module of a base is called so."""
DDP = "module."
_NAMED = (
    re.compile(r"(?P<before>.+\.lora_[AB])\.(?P<name>[^.]+)(?P<after>\.(?:weight|bias))"),
    re.compile(r"(?P<before>.+\.lora_embedding_[AB])\.(?P<name>[^.]+)(?P<after>)"),
    re.compile(r"(?P<before>.+\.trainable_tokens_delta)\.(?P<name>[^.]+)(?P<after>)"),
)
_PLAIN = re.compile(r".+\.(?:lora_[AB]\.(?:weight|bias)|lora_embedding_[AB]|trainable_tokens_delta)")
T = TypeVar("T")


def unwrapped(name: str) -> str:
    """A name without the words of wrappers."""
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


def as_peft(file: Path, header: Mapping[str, T]) -> dict[str, T]:
    """What a file holds, by the keys that PEFT would write.

    Raises:
        ValueError: spellings are mixed, there are several adapters, or two tensors would get one key.
    """
    keys = {key: unwrapped(key) for key in header}
    keys = _with_prefix(file, keys)
    keys = _without_adapter(file, keys)
    found: dict[str, str] = {}
    for old, new in keys.items():
        if new in found:
            raise ValueError(
                f"Two tensors of {file} are for one: '{_files.shown(found[new])}' and '{_files.shown(old)}'.\n"
                "  Leave out the one that does not belong to the adapter."
            )
        found[new] = old
    return {new: header[found[new]] for new in sorted(found)}


def _with_prefix(file: Path, keys: Mapping[str, str]) -> dict[str, str]:
    """The keys with the prefix once, if all have it as often."""
    starts = {old: _start(new) for old, new in keys.items()}
    kinds = {start: old for old, start in starts.items()}
    if len(kinds) > 1:
        (one, first), (two, second), *_ = sorted(kinds.items())
        raise ValueError(
            f"The tensors of {file} are named in several ways: '{_files.shown(first)}' begins with {_said(one)}, "
            f"'{_files.shown(second)}' with {_said(two)}.\n"
            f"  All names of a PEFT adapter begin with '{PREFIX}': it may be mixed with tensors that are not part of it."
        )
    (start,) = kinds
    if not start and any(new.startswith(DDP) for new in keys.values()):
        raise ValueError(
            f"The tensors of {file} begin with '{DDP}' and not with '{PREFIX}': '{_files.shown(next(iter(keys)))}'. DDP may have put "
            "it there, or the base has a module of that name.\n"
            f"  Rename them, so that they begin with '{PREFIX}' and the name of the module in the base."
        )
    if not start and not any(".lora_" in new for new in keys.values()):
        raise ValueError(
            f"The tensor '{_files.shown(next(iter(keys)))}' of {file} does not begin with '{PREFIX}', and none is a factor: it is not "
            "an adapter."
        )
    return {old: PREFIX + new.removeprefix(start) for old, new in keys.items()}


def _start(key: str) -> str:
    """What a key has up to the last of the prefixes that it begins with."""
    rest = key
    while rest.startswith(DDP):
        rest = rest.removeprefix(DDP)
    if not rest.startswith(PREFIX):
        return ""
    while rest.startswith(PREFIX):
        rest = rest.removeprefix(PREFIX)
        while rest.startswith(DDP + PREFIX):
            rest = rest.removeprefix(DDP)
    return key.removesuffix(rest)


def _without_adapter(file: Path, keys: Mapping[str, str]) -> dict[str, str]:
    """The keys without the name of the adapter, which ``state_dict()`` has and PEFT takes out."""
    matches = {old: _named(new) for old, new in keys.items()}
    found = {old: match for old, match in matches.items() if match is not None}
    if not found:
        return dict(keys)
    names = sorted({match["name"] for match in found.values()})
    if len(names) > 1:
        raise ValueError(
            f"{file} holds {len(names)} adapters: {', '.join(_files.shown(name, 40) for name in names[:5])}.\n"
            "  Save each for itself: model.save_pretrained(folder, selected_adapters=[name])."
        )
    plain = next((old for old, new in keys.items() if old not in found and _PLAIN.fullmatch(new)), None)
    if plain is not None:
        raise ValueError(
            f"The tensors of {file} are named in several ways: '{_files.shown(next(iter(found)))}' has the adapter's name "
            f"'{_files.shown(names[0], 40)}', '{_files.shown(plain)}' has not.\n  Two adapters may be mixed: save one with PEFT."
        )
    whole = f".modules_to_save.{names[0]}."
    plain_keys = {old: new.replace(whole, ".", 1) for old, new in keys.items()}
    return plain_keys | {old: match["before"] + match["after"] for old, match in found.items()}


def _named(key: str) -> re.Match[str] | None:
    if _PLAIN.fullmatch(key):
        return None
    return next((match for pattern in _NAMED if (match := pattern.fullmatch(key))), None)


def _said(start: str) -> str:
    return f"'{start}'" if start else "no prefix"
