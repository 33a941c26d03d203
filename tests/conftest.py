"""Settings under which every test runs: types and ranks are never promoted in silence."""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _settings():
    yield
    assert jax.config.jax_numpy_dtype_promotion == "strict"
