"""Settings under which every test runs: types and ranks are never promoted in silence."""

import os

# Eight CPU devices, for meshes; what does not ask for one runs on the first. Before the first import of JAX.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import jax
import pytest

# Not tests: collected for doctests, they would be imported a second time, and add their rows to the table again.
collect_ignore = [
    "case.py",
    "cases.py",
    "cases_joined.py",
    "cases_constant.py",
    "measure.py",
    "make_peft_fixtures.py",
    "peft_models.py",
]


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def standard_promotion(strict_promotion):
    """For tests of other libraries' code that needs JAX's usual promotion (optax's bias correction)."""
    with jax.numpy_dtype_promotion("standard"):
        yield
