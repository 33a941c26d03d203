"""Training with the real optax and orbax: masks, frozen optimisers, checkpoints, resuming."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jlora


def net(params, x):
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return hidden @ params["down"]["kernel"]


pytestmark = pytest.mark.usefixtures("standard_promotion")
RNG = np.random.default_rng(0)
PARAMS = {
    "up": {"kernel": jnp.asarray(RNG.standard_normal((5, 64)), jnp.float32), "bias": jnp.zeros(64)},
    "down": {"kernel": jnp.asarray(RNG.standard_normal((64, 3)), jnp.float32)},
}
X = jnp.asarray(RNG.standard_normal((16, 5)), jnp.float32)
Y = jnp.asarray(RNG.standard_normal((16, 3)), jnp.float32)
SITES = jlora.sites(net, PARAMS, X)
RULES = [jlora.LoRA(rank=2, targets=".*/kernel"), jlora.Full(targets=".*/bias")]
APPLY = jlora.wrap(net)


def fresh():
    return jlora.init(jax.random.key(0), PARAMS, SITES, RULES)


def tree_loss(tree):
    return ((APPLY(tree["base"], tree["lora"], X) - Y) ** 2).mean()


def train(tx, steps=5):
    tree = {"base": PARAMS, "lora": fresh()}
    state = tx.init(tree)
    for _ in range(steps):
        updates, state = tx.update(jax.grad(tree_loss)(tree), state, tree)
        tree = optax.apply_updates(tree, updates)
    return tree, state


def test_labels_and_trainable():
    tree = {"base": PARAMS, "lora": fresh(), "step": jnp.zeros(())}
    labels = jlora.labels(tree)
    assert labels["lora"]["up/kernel"].a == "a"
    assert labels["lora"]["up/kernel"].b == "b"
    assert labels["lora"]["up/bias"].value == "full"
    assert jax.tree.leaves(labels["base"]) == ["frozen"] * 3
    assert labels["step"] == "frozen"
    mask = jlora.trainable(tree)
    assert jax.tree.structure(mask) == jax.tree.structure(tree)
    assert jax.tree.map(lambda label: label != "frozen", labels) == mask
    for fn in (jlora.labels, jlora.trainable, jlora.freeze(optax.sgd(1.0)).init):
        with pytest.raises(ValueError, match="no adapter in this tree"):
            fn({"base": PARAMS})
    with pytest.raises(TypeError, match="freeze takes an optax transformation"):
        jlora.freeze(1e-3)


def test_labels_of_a_masked_adapter():
    """A factor that was masked out leaves the other with its own label."""
    lora = {"w": jlora.LowRank(**{**vars(fresh()["up/kernel"]), "a": None})}
    assert jlora.labels(lora)["w"].b == "b"


FREEZING = {
    "freeze": jlora.freeze(optax.adamw(1e-2)),
    "inject_hyperparams": optax.inject_hyperparams(lambda learning_rate: jlora.freeze(optax.adamw(learning_rate)))(
        learning_rate=1e-2
    ),
    "a mask of weight decay": jlora.freeze(
        optax.inject_hyperparams(optax.adamw, static_args="mask")(learning_rate=1e-2, mask=jlora.trainable)
    ),
    "chain": jlora.freeze(
        optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1e-2, 10), weight_decay=0.1)
        )
    ),
    "partition": optax.partition(
        {"a": optax.adam(1e-3), "b": optax.adam(1.6e-2), "full": optax.sgd(1e-2), "frozen": optax.set_to_zero()},
        jlora.labels,
    ),
    "multi_steps": optax.MultiSteps(jlora.freeze(optax.adam(1e-2)), every_k_schedule=2),
}


@pytest.mark.parametrize("name", FREEZING)
def test_a_loss_on_the_base_itself_leaves_the_base(name):
    def loss(tree):
        return tree_loss(tree) + sum((x**2).sum() for x in jax.tree.leaves(tree["base"]))

    def trained(tx):
        @jax.jit
        def step(tree, state):
            updates, state = tx.update(jax.grad(loss)(tree), state, tree)
            return optax.apply_updates(tree, updates), state

        tree = {"base": PARAMS, "lora": fresh()}
        state = tx.init(tree)
        for _ in range(6):
            tree, state = step(tree, state)
        return tree

    tree = trained(FREEZING[name])
    jax.tree.map(np.testing.assert_array_equal, tree["base"], PARAMS)
    assert all(
        bool((x != y).any()) for x, y in zip(jax.tree.leaves(tree["lora"]), jax.tree.leaves(fresh()), strict=True)
    )
    # A mask alone does not freeze: what freezes is known to be needed.
    masked = trained(optax.masked(optax.adamw(1e-2), jlora.trainable))
    assert bool((masked["base"]["up"]["kernel"] != PARAMS["up"]["kernel"]).any())


def test_a_mask_that_is_taken_for_a_schedule():
    tree = {"base": PARAMS, "lora": fresh()}
    for fn in (jlora.trainable, jlora.labels):
        with pytest.raises(TypeError, match=r"(?s)got: a number.*inject_hyperparams.*static_args='mask'"):
            optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3, mask=fn).init(tree)


@pytest.mark.parametrize(
    "tx",
    [optax.masked(optax.adamw(1e-2), jlora.trainable), *FREEZING.values()],
    ids=["masked", *FREEZING],
)
def test_optimisers_train_the_adapter_and_leave_the_base(tx):
    before = float(tree_loss({"base": PARAMS, "lora": fresh()}))
    tree, _ = train(tx, steps=20)
    assert float(tree_loss(tree)) < 0.9 * before
    jax.tree.map(np.testing.assert_array_equal, tree["base"], PARAMS)
    assert all(
        bool((x != y).any()) for x, y in zip(jax.tree.leaves(tree["lora"]), jax.tree.leaves(fresh()), strict=True)
    )


def test_frozen_base_has_no_optimiser_state():
    tree = {"base": PARAMS, "lora": fresh()}
    trained = sum(x.size for x in jax.tree.leaves(tree["lora"]))
    for tx in (jlora.freeze(optax.adam(1e-2)), optax.masked(optax.adam(1e-2), jlora.trainable)):
        assert sum(x.size for x in jax.tree.leaves(tx.init(tree)) if x.ndim) == 2 * trained


def test_clipping_sees_the_adapter_only():
    tree = {"base": PARAMS, "lora": fresh()}
    grads = jax.tree.map(jnp.ones_like, tree)  # as if the base had gradients
    tx = jlora.freeze(optax.clip_by_global_norm(1.0))
    updates, _ = tx.update(grads, tx.init(tree), tree)
    assert float(optax.tree.norm(updates["lora"])) == pytest.approx(1.0, rel=1e-5)
    chex.assert_trees_all_equal(updates["base"], jax.tree.map(jnp.zeros_like, PARAMS))


def test_base_gradients_are_stopped_unless_asked_for():
    def loss(base, apply):
        return apply(base, fresh(), X).sum()

    assert float(optax.tree.norm(jax.grad(loss)(PARAMS, APPLY))) == 0.0
    got = jax.grad(loss)(PARAMS, jlora.wrap(net, train_base=True))
    expected = jax.grad(lambda p: net(p, X).sum())({**PARAMS})
    chex.assert_trees_all_close(got["down"], expected["down"], rtol=1e-5)


# --- checkpoints of a training run -----------------------------------------------------------------------------------


def steps_of(lora, state, tx, first, last):
    @jax.jit
    def step(lora, state, x, y):
        grads = jax.grad(lambda l: ((APPLY(PARAMS, l, x) - y) ** 2).mean())(lora)
        updates, state = tx.update(grads, state, lora)
        return optax.apply_updates(lora, updates), state

    for i in range(first, last):
        order = np.random.default_rng(i).permutation(16)[:8]
        lora, state = step(lora, state, X[order], Y[order])
    return lora, state


def test_checkpoint_manager_keeps_adapter_optimiser_and_step(tmp_path):
    tx = optax.adam(1e-2)
    lora = fresh()
    whole, _ = steps_of(lora, tx.init(lora), tx, 0, 9)

    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        lora, state = fresh(), tx.init(fresh())
        for stop in (2, 4, 6):
            lora, state = steps_of(lora, state, tx, stop - 2, stop)
            train = ocp.args.StandardSave({"lora": lora, "opt": state})
            manager.save(
                stop, args=ocp.args.Composite(train=train, about=ocp.args.JsonSave(jlora.describe(lora, step=stop)))
            )
        manager.wait_until_finished()
        assert sorted(manager.all_steps()) == [4, 6]

    # Only what is trained is on disk: less than the base alone would be. The arrays are 5*64-fold smaller than their fixed costs here,
    # so compare what orbax says it wrote.
    with ocp.CheckpointManager(tmp_path) as manager:
        about = manager.restore(6, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
        assert about["meta"] == {"step": 6}
        target = jlora.restore_target(about, PARAMS)
        assert jax.tree.structure(target) == jax.tree.structure(fresh())
        abstract = {"lora": target, "opt": jax.eval_shape(tx.init, target)}
        restored = manager.restore(6, args=ocp.args.Composite(train=ocp.args.StandardRestore(abstract)))["train"]
        shapes = {tuple(x.shape) for x in jax.tree.leaves(manager.item_metadata(6)["train"])}
    assert shapes == {tuple(np.shape(x)) for x in jax.tree.leaves(abstract)}
    assert not shapes & {(5, 64), (64, 3)}
    again, _ = steps_of(restored["lora"], restored["opt"], tx, 6, 9)
    chex.assert_trees_all_equal(again, whole)  # bit for bit


def test_only_adapter_bytes_are_written(tmp_path):
    params = {
        "w": jnp.asarray(RNG.standard_normal((1024, 1024)), jnp.float32),
        "v": jnp.asarray(RNG.standard_normal((1024, 1024)), jnp.float32),
    }
    sites = jlora.sites(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], params, jnp.ones((2, 1024)))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=4, targets=".*"))
    lora = jax.tree.map(lambda x: jnp.asarray(RNG.standard_normal(x.shape), x.dtype), lora)
    jlora.save(tmp_path / "adapter", lora)
    written = sum(p.stat().st_size for p in (tmp_path / "adapter").rglob("*") if p.is_file())
    adapter = sum(x.nbytes for x in jax.tree.leaves(lora))
    assert adapter * 0.9 < written < adapter + 40_000 < sum(x.nbytes for x in jax.tree.leaves(params)) / 40
