"""Settings under which every test runs: types and ranks are never promoted in silence."""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def standard_promotion():
    """For tests of other libraries' code that needs JAX's usual promotion (optax's bias correction)."""
    with jax.numpy_dtype_promotion("standard"):
        yield
