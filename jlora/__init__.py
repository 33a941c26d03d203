"""jlora: low-rank adaptation of any JAX function of a parameter tree."""

import importlib
from typing import TYPE_CHECKING

from jlora._adapters import Adapter as Adapter
from jlora._adapters import FullWeight as FullWeight
from jlora._adapters import LowRank as LowRank
from jlora._checkpoint import load as load
from jlora._checkpoint import metadata as metadata
from jlora._checkpoint import save as save
from jlora._describe import describe as describe
from jlora._describe import restore_target as restore_target
from jlora._init import init as init
from jlora._interpret import DenseWeightError as DenseWeightError
from jlora._merge import delta as delta
from jlora._merge import merge as merge
from jlora._optim import freeze as freeze
from jlora._optim import labels as labels
from jlora._optim import trainable as trainable
from jlora._rules import Full as Full
from jlora._rules import LoRA as LoRA
from jlora._sharding import shardings as shardings
from jlora._sites import Site as Site
from jlora._sites import Sites as Sites
from jlora._sites import sites as sites
from jlora._summary import summary as summary
from jlora._wrap import wrap as wrap

if TYPE_CHECKING:
    from jlora import algebra as algebra
    from jlora import export as export
    from jlora import nnx as nnx
    from jlora import peft as peft
    from jlora import plot as plot

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "DenseWeightError",
    "Full",
    "FullWeight",
    "LoRA",
    "LowRank",
    "Site",
    "Sites",
    "delta",
    "describe",
    "freeze",
    "init",
    "labels",
    "load",
    "merge",
    "metadata",
    "restore_target",
    "save",
    "shardings",
    "sites",
    "summary",
    "trainable",
    "wrap",
]


_LATER = ("algebra", "export", "nnx", "peft", "plot")
"""Modules that are imported when they are asked for: Flax, safetensors and Matplotlib are not needed before."""


def __getattr__(name: str) -> object:
    if name in _LATER:
        return importlib.import_module(f"jlora.{name}")
    raise AttributeError(f"module 'jlora' has no attribute {name!r}")
