"""Every test of the command line runs in a folder of its own."""

import jax
import pytest

import jlora


@pytest.fixture(autouse=True)
def promotion(strict_promotion):
    """The models are written as people write them."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own(here):
    """Two adapters of jlora's own, ``one`` and ``two``."""
    from cli_case import trained  # skips the test, not this file, without the cli extra

    for seed, name in enumerate(("one", "two")):
        jlora.save(here / name, trained(seed), base_model_name_or_path="me/tiny", task=f"demo {seed}")
    return here / "one", here / "two"
