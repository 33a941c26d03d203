"""Whether the configuration and the tensors of a PEFT adapter say the same: what it declares is there, and what is there it declares.

PEFT drops factors that the configuration leaves out, and starts anew what the file lacks. What can be known depends on what is known of
the base: with its names (``Base``) all that the configuration matches must be there; without, only what the configuration names itself.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple, NoReturn

from jlora import _files, _paths
from jlora._peft_config import FILE, Config
from jlora._peft_keys import FACTORS, Part, containing, path_of
from jlora._peft_match import Ends
from jlora._text import counted

IN_PROJ, OUT_PROJ = "in_proj_weight", "out_proj"  # of nn.MultiheadAttention
SAVES_BIASES = (0, 21, 2)  # from which PEFT saves those of bias="lora_only"; huggingface/peft#3306
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
"""What PEFT adds to ``modules_to_save`` for a task, whether or not the base has it."""
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


class Base(NamedTuple):
    """What is known of the base.

    Attributes:
        names: Of its parameters, as PEFT has them.
        weights: Those that PEFT can adapt; of each whether it is a matrix that is multiplied with, as that of ``nn.Linear``.
        exact: Whether the base is the model that was adapted. A checkpoint may have more: other heads, and what only training needs.
        twins: Of names, the others of the same leaf.
    """

    names: Collection[str]
    weights: Mapping[str, bool]
    exact: bool
    twins: Mapping[str, Collection[str]]


class Declared:
    """One adapter, with its configuration.

    Args:
        config: What it declares.
        parts: What it has.
        shapes: Of its tensors, by their keys.
        wrappers: How many wrappers there are around each adapted module.
        some_biases: Whether the file says that it has only some of the biases that the configuration declares.
    """

    def __init__(
        self,
        config: Config,
        parts: Mapping[str, Part],
        shapes: Mapping[str, tuple[int, ...]],
        wrappers: Mapping[str, int],
        some_biases: bool = False,
    ):
        self.config, self.parts, self.shapes, self.wrappers = config, parts, shapes, wrappers
        self.some_biases = some_biases
        self.targets, self.saved = config.targets, Ends(config.saved)
        self.whole = {part.name for part in parts.values() if part.role not in (*FACTORS, "tokens")}
        self.adapted = {part.module for part in parts.values() if part.role == "a"}
        self.carried = {
            part.module for part in parts.values() if part.role == "weight" and not self.is_saved(part.module)
        }

    def is_saved(self, module: str) -> bool:
        """Whether a module, or one that it is in, is saved whole; PEFT compares the ends of paths, letter by letter."""
        around = [path_of(m, self.wrappers) for m in (*containing(module), module) if m]
        return any(self.saved.match_letters(path) for path in around)

    def is_bias(self, part: Part) -> bool:
        """Whether a tensor is a bias that the configuration says is trained."""
        kind = self.config.bias
        return part.role == "bias" and (kind == "all" or (kind == "lora_only" and part.module in self.adapted))

    # --- What is there, and not declared ---

    def check_undeclared(self, *, alone: bool) -> None:
        """Raises if the file has what the configuration leaves out. With a base, whole weights are compared with it elsewhere."""
        factors = sorted({part.module for part in self.parts.values() if part.role == "a" and not self.is_target(part)})
        if factors:
            _refuse(
                f"The adapter has factors for {counted(len(factors), 'module')} that its configuration leaves out",
                factors,
                "PEFT does not apply them. If they belong to it, put their names into target_modules of "
                f"{FILE} and see what exclude_modules, modules_to_save and layers_to_transform leave out.",
            )
        keys = [key for key, part in self.parts.items() if part.role == "b_bias" and not self.config.lora_bias]
        if keys:
            _refuse(
                "The adapter has biases of B, and its configuration says lora_bias=false",
                keys,
                "Say true in " + FILE + ".",
            )
        keys = [key for key, part in self.parts.items() if part.role == "bias" and not self.is_known(part)]
        if keys:
            _refuse(
                f"The adapter has biases of the base, and its configuration says bias={self.config.bias}",
                keys,
                f"If they were trained, say bias=all in {FILE}.",
            )
        keys = [
            k
            for k, p in self.parts.items()
            if p.role == "tokens" and not any(map(p.module.endswith, self.config.tokens))
        ]
        if keys:
            _refuse(
                "The adapter has rows of trained tokens that its configuration does not list",
                keys,
                f"Say in trainable_token_indices of {FILE} which tokens they are.",
            )
        if alone:
            self._check_whole()

    def is_known(self, part: Part) -> bool:
        """Whether a bias may be there: it was trained, or PEFT saved it beside its module's weight, as it does with embeddings."""
        return self.is_bias(part) or self.is_saved(part.module) or part.module in self.carried

    def is_target(self, part: Part) -> bool:
        """Whether the configuration adapts the module of a factor."""
        module, outer = part.module, part.module.rpartition(".")[0]
        if self.targets.holds(module):
            return True
        of_attention = (
            module.endswith(f".{OUT_PROJ}") and outer in self.wrappers and self.targets.match(outer) is not False
        )
        found = self.targets.match(module)
        if found is None:
            found = not (self.targets.linear and part.end.startswith("lora_embedding"))
        return found or of_attention or (self.config.tying and self._is_tied(part))

    def _is_tied(self, part: Part) -> bool:
        """Whether a factor may be that of a head tied to an adapted table: PEFT adapts both, and lists one (``ensure_weight_tying``)."""
        shapes = {
            p.role: self.shapes[k] for k, p in self.parts.items() if p.module == part.module and p.role in FACTORS
        }
        tables: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
        for key, other in self.parts.items():
            if other.end.startswith("lora_embedding") and self.targets.match(other.module):
                tables[other.module][other.role] = self.shapes[key]
        turned = {role: shapes[other][::-1] for role, other in (("a", "b"), ("b", "a")) if other in shapes}
        return any(table in (turned, shapes) for table in tables.values())

    def _check_whole(self) -> None:
        """PEFT writes whole weights that it does not list only of resized embeddings, of which a model has two."""
        keys = [
            key
            for key, part in self.parts.items()
            if part.role not in (*FACTORS, "tokens", "bias")
            and not self.is_saved(part.module)
            and part.module not in self.adapted
            and not (self.config.bias == "all" and "bias" in key)
        ]
        tables = {
            self.parts[key].module for key in keys if len(self.shapes[key]) == 2 and self.parts[key].role == "weight"
        }
        if len(tables) > 2 or any(self.parts[key].module not in tables for key in keys):
            _refuse(
                "The adapter has whole weights that its configuration does not list",
                keys,
                f"If they were trained, put their modules into modules_to_save of {FILE}.",
            )

    # --- What is declared, and not there ---

    def check_missing(self, base: Base | None) -> None:
        """Raises if the file lacks what the configuration declares."""
        self._check_modules(base)
        self._check_tokens()
        if self.config.lora_bias:
            have = {(part.module, part.depth) for part in self.parts.values() if part.role == "b_bias"}
            lacking = {
                part.module
                for part in self.parts.values()
                if part.role == "a" and (part.module, part.depth) not in have and self._has_bias_of_b(part)
            }
            if lacking:
                _refuse(
                    "The configuration says lora_bias=true, and the adapter lacks lora_B.bias of", sorted(lacking), _CUT
                )
        if base is not None:
            self._check_biases(base)

    def _has_bias_of_b(self, part: Part) -> bool:
        return not part.end.startswith("lora_embedding") and not self.targets.holds(part.module)

    def _check_modules(self, base: Base | None) -> None:
        parts = [part for part in self.parts.values() if part.name in self.whole and part.role not in FACTORS]
        paths = {path_of(m, self.wrappers) for part in parts for m in (*containing(part.module), part.module) if m}
        absent = [name for name in self.config.saved if not any(path.endswith(name) for path in paths)]
        if len(absent) < len(self.config.saved):
            absent = [name for name in absent if name not in _HEADS.get(self.config.task, ())]
        if absent:
            _refuse("The configuration says modules_to_save, and the adapter has nothing for", absent, _CUT)
        lacking = [
            name
            for name in (base.names if base is not None else ())
            if name not in self.whole
            and (base is None or base.exact or name.endswith((".weight", ".bias")))
            and self.is_saved(name.rpartition(".")[0])
            and not (base and self.config.tying and self.whole.intersection(base.twins.get(name, ())))
        ]
        if lacking:
            _refuse("The configuration says modules_to_save, and the adapter lacks", lacking, _CUT)

    def _check_tokens(self) -> None:
        have = [part.module for part in self.parts.values() if part.role == "tokens"]
        there = {ids for name, ids in self.config.tokens.items() if any(module.endswith(name) for module in have)}
        lacking = [
            name or "the embedding"
            for name, ids in self.config.tokens.items()
            if not any(module.endswith(name) for module in have) and not (self.config.knows_ties and ids in there)
        ]
        if lacking:
            _refuse("The configuration says trainable_token_indices, and the adapter has no rows of", lacking, _CUT)

    def _check_biases(self, base: Base) -> None:
        if self.config.bias == "none" or self.some_biases:
            return
        if self.config.bias == "all":
            wanted = [name for name in base.names if name == "bias" or name.endswith(".bias")]
        else:
            wanted = [f"{m}.bias" for m in sorted(self.adapted) if f"{m}.bias" in base.names]
        lacking = [name for name in wanted if name not in self.whole]
        if not base.exact:
            like = {_like(name) for name in self.whole}
            lacking = [name for name in lacking if _like(name) in like]
        dropped = self.config.bias == "lora_only" and self.config.version < SAVES_BIASES and len(lacking) == len(wanted)
        if lacking and not dropped:
            _refuse(
                f"The configuration says bias={self.config.bias}, and the adapter lacks",
                lacking,
                _CUT,
            )

    def check_factors(self, base: Base, have: Collection[str], begun: Collection[str] = ()) -> None:
        """Raises if the file lacks factors of weights that the configuration adapts.

        Args:
            base: Its weights.
            have: Those that have factors.
            begun: Those that are the same leaf as one that has.
        """
        like = {_like(name) for name in have}
        stacks = {name[: found.start()] for name in have if (found := _NUMBER.search(name))}
        missing = []
        for name, is_linear in base.weights.items():
            if name in have:
                continue
            adapted = name in begun or self._is_adapted(name, base, is_linear, like)
            number = _NUMBER.search(name)
            in_stack = number is not None and name[: number.start()] in stacks
            missing += [name] if adapted and (base.exact or in_stack or _like(name) in like) else []
        if missing:
            raise ValueError(
                f"The adapter lacks factors for {counted(len(missing), 'weight')}: {_listed(missing)}.\n"
                "  The file was cut, or the base shares a weight that PEFT has twice (a tied head). Where the adapted model did not have\n"
                f"  them: put their modules into exclude_modules of {FILE}."
            )

    def _is_adapted(self, name: str, base: Base, is_linear: bool, like: Collection[str]) -> bool:
        module, _, last = name.rpartition(".")
        if self.is_saved(module):
            return False
        if self.config.is_parameter(name):
            return True
        if last not in ("weight", IN_PROJ):
            return False
        outer = module.rpartition(".")[0]
        is_out = module.endswith(f".{OUT_PROJ}") and f"{outer}.{IN_PROJ}" in base.names
        found = [self.targets.match(m) for m in ({module, outer} if is_out else {module})]
        if None in found:  # then what has factors in one layer has them in all
            return _like(name) in like and (is_linear or not self.targets.linear)
        return any(found)


_CUT = "The file was cut, or was not saved whole: save it again with PEFT."


def _like(name: str) -> str:
    """A name without its numbers, which it has in common with those of other layers."""
    return _NUMBER.sub("*", name)


def _listed(names: Iterable[str]) -> str:
    return _paths.listing([_files.shown(name) for name in names], 5)


def _refuse(what: str, names: Iterable[str], advice: str) -> NoReturn:
    raise ValueError(f"{what}: {_listed(names)}.\n  {advice}")
