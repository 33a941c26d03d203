"""``adapter_config.json``: read so that nothing that changes the arithmetic is passed over, written so that all readers agree."""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jlora import _files
from jlora._advice import Advised
from jlora._peft_match import Patterns
from jlora._peft_regex import Budget, Regex
from jlora._peft_spelling import unwrapped
from jlora._peft_targets import Targets, regex, strings

FILE = "adapter_config.json"
VERSION = "0.21.2"  # of PEFT, whose conventions are followed
ADDS_TWICE = (
    0,
    21,
    2,
)  # up to which it adds the update of nn.MultiheadAttention's out_proj twice; huggingface/peft#3774 mends it

_IGNORED = frozenset(
    [
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
        "fan_in_fan_out",
        "layers_pattern",
        "megatron_core",
        "runtime_config",
        "qalora_group_size",
        "eva_config",
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "lora_bias",
        "modules_to_save",
        "target_modules",
        "target_parameters",
        "exclude_modules",
        "layers_to_transform",
        "trainable_token_indices",
        "init_lora_weights",
        "ensure_weight_tying",
        "loftq_config",
        "corda_config",
        "lora_ga_config",
    ]
)
_PLAIN_STARTS = frozenset({"none", "true", "false", "gaussian", "eva", "orthogonal", "mica"})
_REFUSED = {
    "use_dora": "DoRA's magnitudes, which jlora does not have",
    "use_qalora": "QA-LoRA, which pools the inputs of A",
    "layer_replication": "a base whose layers are repeated",
    "use_bdlora": "block-diagonal factors",
}


class Config(NamedTuple):
    """What of a configuration matters.

    ``knows_ties`` tells whether PEFT found out that a head is tied to a table: it asks the configuration of a model of transformers, and
    never the weights.
    """

    rank: int
    alpha: float
    rslora: bool
    dropout: float
    rank_pattern: Patterns
    alpha_pattern: Patterns
    targets: Targets
    bias: str
    lora_bias: bool
    saved: tuple[str, ...]
    task: str
    tokens: Mapping[str, tuple[int, ...]]
    tying: bool
    knows_ties: bool
    version: tuple[int, ...]

    def rank_of(self, key: str) -> int:
        """The rank of the module ``key``."""
        return int(self.rank_pattern.find(key, self.rank))

    def is_parameter(self, name: str) -> bool:
        """Whether PEFT adapts a parameter as such, ``target_parameters``, whatever its module does with it."""
        return self.targets.is_parameter(name)

    def scale(self, key: str, rank: int) -> float:
        """The factor of the update of the module ``key``, whose tensors have rank ``rank``."""
        expected = self.rank_pattern.all(key) or {self.rank}
        if rank not in expected:  # of several, PEFT took one: the tensors say which
            several = " or ".join(str(int(x)) for x in sorted(expected))
            raise ValueError(
                f"'{_files.shown(key)}' has rank {rank} in its tensors and {several} in {FILE}.\n  The file is damaged."
            )
        alpha = self.alpha_pattern.find(key, self.alpha)
        return float(alpha) / (math.sqrt(rank) if self.rslora else rank)


def content_of(folder: Path, digest: str = "") -> dict[str, Any]:
    """What a configuration says, whose SHA-256 is ``digest`` if that is known.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged.
    """
    file = folder / FILE
    if not file.exists():
        raise FileNotFoundError(f"There is no PEFT adapter at {folder}: it has no {FILE}.")
    return _files.read_json(file, digest=digest)


def read(folder: Path, content: Mapping[str, Any] | None = None) -> Config:
    """Reads and checks a configuration; ``content`` is what it says, if that was read.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or asks for something that is not LoRA as jlora has it.
    """
    file = folder / FILE
    c = content_of(folder) if content is None else content
    kind = c.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{file} is of type {_files.shown(kind)}; only LORA can be read.")
    _refuse(c, file)
    rank: Any = c.get("r")
    alpha: Any = c.get("lora_alpha")
    dropout = c.get("lora_dropout") or 0.0
    _need(_whole(rank) and rank >= 1, file, "r", rank, "a whole number from 1 up")
    _need(_positive(alpha), file, "lora_alpha", alpha, "a finite number above 0")
    _need(_real(dropout) and 0 <= dropout < 1, file, "lora_dropout", dropout, "a rate from 0 up to, not including, 1")
    rslora = c.get("use_rslora", False)
    _need(isinstance(rslora, bool), file, "use_rslora", rslora, "true or false")
    bias = c.get("bias") or "none"
    _need(bias in ("none", "all", "lora_only"), file, "bias", bias, "none, all or lora_only")
    lora_bias = c.get("lora_bias") or False
    _need(isinstance(lora_bias, bool), file, "lora_bias", lora_bias, "true or false")
    budget = Budget()
    return Config(
        int(rank),
        float(alpha),
        rslora,
        float(dropout),
        _pattern(file, "rank_pattern", c.get("rank_pattern") or {}, budget),
        _pattern(file, "alpha_pattern", c.get("alpha_pattern") or {}, budget),
        Targets(file, c, budget),
        str(bias),
        lora_bias,
        tuple(map(unwrapped, strings(file, "modules_to_save", c.get("modules_to_save") or []))),
        str(c.get("task_type") or ""),
        _tokens(file, c.get("trainable_token_indices") or {}),
        c.get("ensure_weight_tying") is True and _is_tied(c),
        _is_of_transformers(c),
        _version(c.get("peft_version")),
    )


def write(
    folder: Path,
    *,
    rank: int,
    modules: Sequence[str] | str,
    parameters: Sequence[str],
    saved: Sequence[str],
    bias: str,
    base_model: str | None,
    task_type: str | None,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    dropout: float,
) -> None:
    """Writes a configuration in which alpha is the rank, so that the factors hold the scale."""
    content = {
        "alpha_pattern": dict(alphas),
        "base_model_name_or_path": base_model,
        "bias": bias,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": rank,
        "lora_dropout": dropout,
        "modules_to_save": sorted(saved) or None,
        "peft_type": "LORA",
        "peft_version": VERSION,
        "r": rank,
        "rank_pattern": dict(ranks),
        "target_modules": modules if isinstance(modules, str) else sorted(modules),
        "target_parameters": sorted(parameters) or None,
        "task_type": task_type,
        "use_dora": False,
        "use_rslora": False,
    }
    _files.write_json(folder / FILE, content)


def dropout_of(rates: Mapping[str, float], parameters: Sequence[str], wanted: float | None) -> float:
    """The one rate that PEFT trains all factors with.

    Args:
        rates: Of each leaf to which PEFT applies one: it has none for tables.
        parameters: Of the base, that are adapted themselves.
        wanted: The rate to write whatever the leaves have.
    """
    if wanted is not None and not (_real(wanted) and 0 <= wanted < 1):
        raise ValueError(f"dropout must be a rate from 0 up to, not including, 1.\n  got: {wanted!r}")
    found = {rate: path for path, rate in rates.items()} if wanted is None else {wanted: ""}
    if len(found) > 1:
        (one, at), (two, there) = list(found.items())[:2]
        raise Advised(
            f"PEFT trains all factors with one rate of dropout, and these have several: {one} at '{at}', {two} at '{there}'.",
            f"Say which it shall have: save(..., dropout={max(found)}).",
            "dropout",
        )
    rate = float(next(iter(found), 0.0))
    if rate and parameters:
        raise Advised(
            f"PEFT has no dropout for parameters that are adapted themselves, such as '{parameters[0]}', and refuses lora_dropout={rate}.",
            "Say that it shall train without: save(..., dropout=0.0).",
            "dropout",
        )
    return rate


_TABLES = ("embed_tokens", "lm_head")


def _is_tied(c: Mapping[str, Any]) -> bool:
    """Whether PEFT ties what it was told to tie: only if it finds one of two names; what a pattern matches is not asked here."""
    targets, saved = c.get("target_modules") or [], c.get("modules_to_save") or []
    names = [*(targets if isinstance(targets, list) else _TABLES), *saved]
    return any(str(name).rpartition(".")[2] in _TABLES for name in names)


def _is_of_transformers(c: Mapping[str, Any]) -> bool:
    """Whether the file shows that its base is a model of transformers: PEFT writes down the class unless a task tells it."""
    mapping = c.get("auto_mapping")
    if isinstance(mapping, dict):
        return str(mapping.get("parent_library")).startswith("transformers")
    return bool(c.get("task_type") or c.get("base_model_name_or_path"))


def _refuse(c: Mapping[str, Any], file: Path) -> None:
    start = str(c.get("init_lora_weights", True)).lower()
    if start not in _PLAIN_STARTS:
        raise ValueError(
            f"{file} was made with init_lora_weights={_files.shown(start)}, which changes the base before training.\n"
            "  Save it with PEFT's path_initial_model_for_weight_conversion, which makes plain LoRA of it."
        )
    for name, why in _REFUSED.items():
        if c.get(name):
            raise ValueError(f"{file} has {name}: {why}.\n  Merge it into its base with PEFT, and extract an adapter.")
    for name, value in c.items():
        if name not in _IGNORED and name not in _REFUSED and value not in (None, False, [], {}, "none"):
            raise ValueError(
                f"{file} has {_files.shown(name)}, which jlora does not know; it may change what the adapter does."
            )


def _pattern(file: Path, name: str, found: Any, budget: Budget) -> Patterns:
    _need(isinstance(found, dict) and len(found) <= _files.MAX_TENSORS, file, name, found, "an object")
    for key, value in found.items():
        _need(_positive(value), file, f"{name}[{_files.shown(key)}]", value, "a finite number above 0")

    def make(pattern: str, shown: str) -> Regex:
        return regex(file, name, pattern, shown, budget)

    return Patterns(name, found, make)


def _tokens(file: Path, found: Any) -> dict[str, tuple[int, ...]]:
    """Ids by the name of a module; without a name, of the model's embedding."""
    found = {"": found} if isinstance(found, list) else found
    ok = isinstance(found, dict) and all(
        isinstance(ids, list) and all(_whole(i) and i >= 0 for i in ids) and len(set(ids)) == len(ids)
        for ids in found.values()
    )
    _need(ok, file, "trainable_token_indices", found, "ids of tokens, each once, from 0 up")
    return {str(name): tuple(ids) for name, ids in found.items()}


def _version(found: Any) -> tuple[int, ...]:
    numbers = re.match(r"(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?", found) if isinstance(found, str) else None
    return tuple(int(n or 0) for n in numbers.groups()) if numbers else ()


def _need(ok: Any, file: Path, name: str, got: Any, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name} in {file} must be {wanted}.\n  got: {_files.shown(got)}")


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _real(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and -(2**63) < x < 2**63


def _positive(x: Any) -> bool:
    return _real(x) and x > 0
