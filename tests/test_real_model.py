"""A real pretrained language model, end to end: glassllm (852,608 parameters), from Lewis Carroll to Hamlet."""

import assets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def glass():
    model, params, tokenizer = assets.load_glassllm()
    ids = np.asarray(tokenizer.encode(assets.hamlet()).ids, np.int32)
    rows = ids[: len(ids) // 65 * 65].reshape(-1, 65)
    train, held_out = np.split(rows, [len(rows) - len(rows) // 10])
    return model, params, train, held_out


def mean_loss(logits, rows):
    return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()


def test_port_agrees_with_the_reference(glass):
    model, params, *_ = glass
    assert assets.reference_error("glassllm", model, params, assets.load_glassllm()[2]) < 1e-4


def test_adapts_saves_loads_and_merges(glass, tmp_path):
    model, params, train, held_out = glass
    sites = jlora.sites(model.apply, params, train[:2, :-1])
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=8, alpha=16))
    assert len(lora) == 7 * 4  # every kernel of every layer, and not the tied head
    assert set(sites) - set(lora) == {"params/embed/embedding"}
    apply, tx = jlora.wrap(model.apply), optax.adam(optax.cosine_decay_schedule(1e-2, 100))
    before = jax.tree.map(np.array, params)

    @jax.jit
    def step(params, lora, state, rows):
        value, grads = jax.value_and_grad(lambda lora: mean_loss(apply(params, lora, rows[:, :-1]), rows))(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state, value

    perplexity = jax.jit(lambda params, rows: jnp.exp(mean_loss(model.apply(params, rows[:, :-1]), rows)))
    start = float(perplexity(params, held_out))
    assert start == pytest.approx(141, rel=0.03)
    rng, state = np.random.default_rng(0), tx.init(lora)
    for _ in range(100):
        lora, state, _ = step(params, lora, state, train[rng.integers(0, len(train), 16)])
    jlora.save(tmp_path / "adapter", lora)
    merged = jlora.merge(params, jlora.load(tmp_path / "adapter", params))
    end = float(perplexity(merged, held_out))
    assert end < 60
    factored = np.asarray(jax.jit(apply)(params, lora, held_out[:4, :-1]))
    np.testing.assert_allclose(
        jax.jit(model.apply)(merged, held_out[:4, :-1]), factored, atol=1e-5 * np.abs(factored).max()
    )
    jax.tree.map(np.testing.assert_array_equal, before, params)
    assert step._cache_size() == 1
