"""Which matrices of a PyTorch model are tables, ``nn.Embedding``, and whether its output head is one of them.

A table and a linear layer of the same shape have the same tensors, and PEFT has other factors for each. A module with a bias is no table.
Beyond that only names tell: of those of linear layers one is taken, any other has to be said.
"""

import re

from jlora import _cli_ties as ties
from jlora import _files, _paths
from jlora._cli_adapters import Refusal
from jlora._cli_weights import Weights, compiled

TABLE = re.compile(
    r".*(embed|wte|wpe|table|vocab|codebook|relative_attention_bias).*|emb|shared", re.IGNORECASE | re.DOTALL
)
"""Names of modules that tables have, before anything else is asked of a name."""
LINEAR = re.compile(
    r".*(proj|linear|dense|attn|attention|qkv|query|key|value|mlp|gate|router|head|classifier|score|pooler|logit).*"
    r"|(fc|lin|ff|wi|c)[_\d].*|fc|lin|ff|wi|[qkvo]|w[qkvo\d]",
    re.IGNORECASE | re.DOTALL,
)
"""Names of modules that linear layers have."""


class Tables:
    """Which weights are tables: what was said with ``--embedding``, or else what biases and names tell."""

    def __init__(self, weights: Weights, pattern: str | None):
        self.weights = weights
        self.pattern = None if pattern is None else compiled("--embedding", pattern)
        self.untold: list[str] = []
        if self.pattern is not None and pattern and not any(map(self.pattern.fullmatch, weights)):
            raise Refusal(
                f"--embedding {pattern!r} matches no weight of the model.\n  A pattern must match the whole name."
            )

    def has(self, name: str) -> bool:
        """Whether a changed matrix is a table. Where nothing tells, it is noted, for ``check_told``."""
        if self.pattern is not None:
            return self.pattern.fullmatch(name) is not None
        if not self._is_linear(name):
            self.untold.append(name)
        return False

    def _is_linear(self, name: str) -> bool:
        module = name.removesuffix(".weight")
        last = ties.last(name)
        return f"{module}.bias" in self.weights or (not TABLE.fullmatch(last) and LINEAR.fullmatch(last) is not None)

    def check_told(self) -> None:
        """Raises if nothing tells of some whether they are tables."""
        if not self.untold:
            return
        listed = _paths.listing([f"'{_files.shown(name)}' {self.weights[name].shape}" for name in self.untold], 8)
        raise Refusal(
            f"What changed may be embeddings, for which PEFT has other factors than for linear layers: {listed}.\n"
            f"  Say which weights are, by a pattern of whole names: --embedding '{_files.shown(self.untold[0])}'.\n"
            "  If none are: --embedding ''."
        )

    def tied_to_head(self, name: str) -> str:
        """Why a table is, or may be, the output head as well; empty if it is not.

        What the configuration says; where that is silent, whether the model has a head of its own.
        """
        found = ties.tied(self.weights, apart_from=name)
        if found is None:
            return (
                "it may be the output head as well, which PEFT adapts apart: the model has no other, and config.json does not say; "
                'if it is not, put "tie_word_embeddings": false there'
            )
        return "it is tied to the output head, which PEFT adapts apart" if found else ""
