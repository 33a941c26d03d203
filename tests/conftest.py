"""Settings under which every test runs: types and ranks are never promoted in silence."""

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def standard_promotion(strict_promotion):
    """For tests of other libraries' code that needs JAX's usual promotion (optax's bias correction)."""
    with jax.numpy_dtype_promotion("standard"):
        yield
