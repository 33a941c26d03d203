"""What tests of PEFT adapters share: the fixtures that the real PEFT made, a small adapter, and how to change a saved one."""

import json
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
import jlora.export
import jlora.peft

FOLDER = Path(__file__).parent / "fixtures" / "peft"


@pytest.fixture(autouse=True)
def promotion(strict_promotion):
    """The models are written as people write them."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@lru_cache
def expected(kind):
    found = load_file(FOLDER / kind / "expected.safetensors")
    return {k: jnp.asarray(x.astype(np.int32) if x.dtype == np.int64 else x) for k, x in found.items()}


def base_of(kind, port, x):
    """Sites and parameters of a port, from the base that PEFT's adapter was made for."""
    sites = jlora.sites(port.fn, port.struct(), x)
    weights = FOLDER / kind / "base.safetensors"
    return sites, jlora.export.load(weights, port.struct(), sites=sites, names=port.names)


@pytest.fixture
def saved(tmp_path):
    jlora.peft.save(tmp_path / "a", fresh())
    return tmp_path / "a"


def fresh(*rules):
    lora = jlora.init(jax.random.key(0), PARAMS, SITES, rules or [jlora.LoRA(rank=2, alpha=3, targets=".*kernel")])
    return jax.tree.map(lambda x: x + 1, lora)


def edit(folder, config=None, tensors=None):
    """Changes a saved adapter: fields of its configuration, tensors by key (``None`` removes one)."""
    (folder / "checksums.json").unlink(missing_ok=True)  # as the message about what was changed says
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    if tensors is not None:
        found = load_file(folder / "adapter_model.safetensors") | tensors
        save_file({k: v for k, v in found.items() if v is not None}, folder / "adapter_model.safetensors")


def net(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"] + params["down"]["bias"]


PARAMS = {"up": {"kernel": jnp.ones((3, 5))}, "down": {"kernel": jnp.ones((5, 7)), "bias": jnp.zeros(7)}}


SITES = jlora.sites(net, PARAMS, jnp.ones((2, 3)))


UP = "base_model.model.up.lora_A.weight"


def base_files(folder, tensors, shards=1):
    """A base as Hugging Face has it."""
    folder.mkdir()
    parts = [dict(list(tensors.items())[i::shards]) for i in range(shards)]
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {f"model-{i}.safetensors": part for i, part in enumerate(parts)}
    for file, part in files.items():
        save_file(part, folder / file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def zeros(*shape):
    return np.zeros(shape, np.float32)
