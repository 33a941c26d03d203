"""Keys of the tensors in a PEFT adapter: the module that each is of, and the wrappers on the way to it.

PEFT replaces a module that it adapts by a wrapper, and what was there becomes the wrapper's ``base_layer``. A parameter that is adapted
itself (``target_parameters``) has a wrapper around the module that holds it, and one module has as many as it has such parameters, each
around the last. So the key of whatever is inside that module goes through ``.base_layer`` once per wrapper.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from jlora import _files
from jlora._text import counted

TENSORS = "adapter_model.safetensors"
PREFIX = "base_model.model."
BASE = "base_layer"
BIASES, SOME = "jlora.biases", "some"
"""In the metadata of the tensors: only some of the biases that the configuration declares were trained. PEFT always saves all."""

_ROLES = {
    ".lora_A.weight": "a",
    ".lora_B.weight": "b",
    ".lora_B.bias": "b_bias",
    ".lora_embedding_A": "a",
    ".lora_embedding_B": "b",
    ".token_adapter.trainable_tokens_delta": "tokens",
}
TRAINED = "modules_to_save"
_WRAPPED = {TRAINED: 2, "original_module": 1}
"""Of what a wrapper around a module that is saved whole holds, how many words may be between the wrapper and the module's own names."""
FACTORS = ("a", "b", "b_bias")


class Part(NamedTuple):
    """What one tensor of the file is.

    Attributes:
        module: That it is of, by its name in the base.
        depth: How many wrappers of that module its key goes through.
        around: The same for the modules that this one is in, where there are any.
        role: ``"a"``, ``"b"``, ``"b_bias"``, ``"tokens"``, or the name of a parameter of the base.
        end: What its key has after the module.
    """

    module: str
    depth: int
    around: Mapping[str, int]
    role: str
    end: str

    @property
    def name(self) -> str:
        """The name of the parameter, where it is one of the base, or replaces rows of one."""
        return joined(self.module, "weight" if self.role == "tokens" else self.role)


def joined(module: str, last: str) -> str:
    """The name of something in a module; the model itself is ``""``."""
    return f"{module}.{last}" if module else last


def containing(name: str) -> list[str]:
    """The modules that a module or a parameter is in, the outermost first."""
    words = name.split(".")
    return [".".join(words[:i]) for i in range(1, len(words))]


def ends(name: str) -> list[str]:
    """What PEFT may take for a name: all of it, or what follows one of its dots."""
    words = name.split(".")
    return [".".join(words[i:]) for i in range(len(words))]


def part_of(key: str, modules: Collection[str] = ()) -> Part:
    """Reads a key of the file. A ``base_layer`` that is one of the base's own ``modules`` is no wrapper."""
    if not key.startswith(PREFIX):
        raise ValueError(
            f"The tensor '{_files.shown(key)}' does not begin with '{PREFIX}': it is not part of an adapter."
        )
    name = key.removeprefix(PREFIX)
    if name.endswith(".lora_magnitude_vector"):
        raise ValueError(f"The adapter has DoRA's magnitudes ('{_files.shown(key)}'), which jlora does not have.")
    suffix = next((s for s in _ROLES if name.endswith(s)), None)
    if suffix is None and (".lora_" in name or ".token_adapter." in name):
        raise ValueError(f"The tensor '{_files.shown(key)}' is of a kind that jlora does not know.")
    path, dot, end = name.rpartition(suffix or ".") if suffix or "." in name else ("", "", name)
    end = f"{dot}{end}".removeprefix(".")
    role = _ROLES[suffix] if suffix else end
    module, around = "", defaultdict[str, int](int)
    for word in path.split("."):
        inner = joined(module, word)
        if word == BASE and module and inner not in modules:
            around[module] += 1
        else:
            module = inner
    return Part(module, around.pop(module, 0), dict(around), role, end)


def parts_of(keys: Collection[str], saved: Collection[str], modules: Collection[str] = ()) -> dict[str, Part]:
    """What each tensor of a file is, without the copies that PEFT writes and does not read."""
    copies = copies_of(keys, saved, modules)
    return {key: part_of(key, modules) for key in keys if key not in copies}


def copies_of(keys: Collection[str], saved: Collection[str], modules: Collection[str] = ()) -> dict[str, str]:
    """The keys of tensors that PEFT writes twice, and for each the one that it reads.

    With ``bias="all"`` it adds every bias under the name that it has in the model at hand. There a module that is saved whole is a wrapper
    of two: ``original_module``, which the adapter turns off, and what was trained, ``modules_to_save.default`` (the adapter's name is cut
    off where the bias is right inside).

    Args:
        keys: Of the file.
        saved: ``modules_to_save`` of the configuration: names, or ends of them.
        modules: Of the base, where they are known: none of them is a wrapper.
    """
    found: dict[str, str] = {}
    for key in (key for key in keys if key.endswith(".bias")):
        words = key.split(".")
        for i, word in enumerate(words):
            outer = ".".join(words[:i])
            of_base = f"{outer}.{word}".removeprefix(PREFIX) in modules
            if word not in _WRAPPED or of_base or not outer.endswith(tuple(saved)):
                continue
            ends = [words[i + 1 :], words[i + 2 :]][: _WRAPPED[word]]
            read = (one for end in ends if (one := ".".join((outer, *end))) in keys)
            found.update((key, one) for one in read)
    return found


def wrappers_of(parts: Iterable[Part]) -> dict[str, int]:
    """How many wrappers the file has around each module that has any.

    Raises:
        ValueError: there are factors inside a wrapper that has none itself.
    """
    depths: dict[str, set[int]] = defaultdict(set)
    for part in parts:
        if part.role == "a":
            depths[part.module].add(part.depth)
    for module, found in depths.items():
        if found != set(range(len(found))):
            raise ValueError(
                f"The adapter is incomplete: '{_files.shown(module)}' has factors inside {counted(max(found), 'wrapper')}, "
                f"of which only {len(found) - 1} have factors."
            )
    return {module: len(found) for module, found in depths.items()}


def path_of(module: str, wrappers: Mapping[str, int], depth: int = 0) -> str:
    """The path to a module through the wrappers of those that it is in, and through ``depth`` of its own."""
    words = module.split(".")
    path = []
    for word, outer in zip(words, [*containing(module), ""], strict=True):
        path += [word, *[BASE] * (wrappers.get(outer, 0) if outer else depth)]
    return ".".join(path)


def check_once(parts: Mapping[str, Part]) -> None:
    """Raises if two tensors are for one thing."""
    seen: dict[tuple[str, int, str], str] = {}
    for key, part in parts.items():
        other = seen.setdefault((part.module, part.depth if part.role in FACTORS else 0, part.role), key)
        if other != key:
            raise ValueError(
                f"Two tensors of the adapter are for one: '{_files.shown(other)}' and '{_files.shown(key)}'."
            )
