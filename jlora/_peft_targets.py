"""Which modules a PEFT configuration adapts: ``target_modules``, less ``exclude_modules``, ``modules_to_save`` and other layers.

The rules are those of PEFT 0.21.2's ``check_target_module_exists``. A list is compared with the ends of names, a string is a regular
expression of whole names, and "all-linear" is every ``nn.Linear`` but the output head, which names alone do not tell.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jlora import _files
from jlora._peft_match import Ends
from jlora._peft_regex import Budget, Regex, Unsupported
from jlora._peft_spelling import unwrapped

ALL_LINEAR = "all-linear"
_PLAIN = re.compile(r"[\w\-]+")
Match = Callable[[str], bool]


class Targets:
    """What a configuration says of the modules that PEFT adapts.

    Args:
        where: The file, for messages.
        c: The configuration.
        budget: The work that its patterns may take.

    Attributes:
        linear: Whether it says "all-linear".
        parameters: ``target_parameters``: compared with the ends of the names of parameters.

    Raises:
        ValueError: a field is of another kind, or a pattern cannot be matched.
    """

    def __init__(self, where: object, c: Mapping[str, Any], budget: Budget):
        self.where, self.budget = where, budget
        listed = c.get("target_modules")
        text = listed if isinstance(listed, str) else ""
        self.linear = text.lower() == ALL_LINEAR
        self.parameters = tuple(map(unwrapped, strings(where, "target_parameters", c.get("target_parameters") or [])))
        self._holders = Ends(name.rpartition(".")[0] for name in self.parameters)
        self._listed = Ends(self.parameters)
        self._adapted = self._modules("target_modules", None if self.linear else listed)
        self._excluded = self._modules("exclude_modules", c.get("exclude_modules") or [])
        saved = strings(where, "modules_to_save", c.get("modules_to_save") or [])
        self._kept = {name for name in saved if _PLAIN.fullmatch(name)}
        self._kept_too = [
            self._regex("modules_to_save", rf"(^|.*\.){x}($|\..*)", x) for x in saved if x not in self._kept
        ]
        self._layers = self._indices(c.get("layers_to_transform"))
        names = c.get("layers_pattern") or []
        names = strings(where, "layers_pattern", [names] if isinstance(names, str) else names)
        self._layer_names = [self._regex("layers_pattern", rf"(?:^|.*?\.){x}", x) for x in names]
        self._is_list = isinstance(listed, list)

    def match(self, module: str) -> bool | None:
        """Whether PEFT adapts a module of this name, if it is one that it can; ``None`` if the configuration does not tell."""
        if self._excluded is not None and self._excluded(module):
            return False
        if not self._kept.isdisjoint(module.split(".")) or any(x.start(module) for x in self._kept_too):
            return False
        if self._adapted is None:
            return False if self.parameters and not self.linear else None
        if not self._adapted(module):
            return False
        return not self._is_list or self._layers is None or self._layer(module) in self._layers

    def is_parameter(self, name: str) -> bool:
        """Whether PEFT adapts a parameter as such, ``target_parameters``, whatever its module does with it."""
        return self._listed.match(name)

    def holds(self, module: str) -> bool:
        """Whether a parameter that PEFT adapts as such may be one of a module's."""
        return self._holders.match(module)

    def _layer(self, module: str) -> int | None:
        """The number of the layer that a module is in: of the first number in its name, or the first that follows a layer's name."""
        words = module.split(".")
        numbers = [i for i, word in enumerate(words[:-1]) if i and word.isdecimal()]
        if not self._layer_names:
            return next((int(words[i]) for i in numbers if i > 1), None)
        for pattern in self._layer_names:
            for i in numbers:
                if pattern.full(".".join(words[:i])):
                    return int(words[i])
        return None

    def _modules(self, field: str, found: Any) -> Match | None:
        """What compares names with a list, or a regular expression."""
        if found is None:
            return None
        if isinstance(found, str):
            return self._regex(field, found, found).full
        return Ends(map(unwrapped, strings(self.where, field, found))).match

    def _regex(self, field: str, pattern: str, shown: str) -> Regex:
        return regex(self.where, field, pattern, shown, self.budget)

    def _indices(self, found: Any) -> frozenset[int] | None:
        several = found if isinstance(found, list) else [found]
        if found is None or not several:
            return None
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in several):
            raise ValueError(
                f"layers_to_transform in {self.where} must be numbers of layers.\n  got: {_files.shown(found)}"
            )
        return frozenset(several)


def regex(where: object, field: str, pattern: str, shown: str, budget: Budget) -> Regex:
    """The regular expression ``pattern``, which PEFT makes of what a field of the configuration has, ``shown``."""
    try:
        return Regex(pattern, budget)
    except Unsupported as error:
        raise ValueError(
            f"{field} in {where} has the pattern '{_files.shown(shown)}', which is not run: {error}.\n"
            "  Write whole names of modules, or their ends: 'model.layers.0.self_attn.q_proj', 'q_proj'."
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{field} in {where} has '{_files.shown(shown)}', which is not a regular expression: {error}."
        ) from None


def strings(where: object, field: str, found: Sequence[Any] | None) -> tuple[str, ...]:
    """A list of names."""
    found = [] if found is None else found
    if not isinstance(found, list) or not all(isinstance(x, str) for x in found):
        raise ValueError(f"{field} in {where} must be a list of names.\n  got: {_files.shown(found)}")
    return tuple(found)
