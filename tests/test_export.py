"""Merged exports: what is written is the merged base, under PyTorch's names, leaf by leaf; artifacts run without jlora."""

import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_models import PORTS
from safetensors.numpy import load_file, save_file
from test_peft import base_of, expected
from test_peft import promotion as promotion

import jlora
import jlora.export
import jlora.peft


def net(params, x):
    return jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"] + params["down"]["bias"]


X = jnp.ones((2, 3))


def made(dtype=jnp.float32):
    key = jax.random.key(1)
    params = {
        "up": {"kernel": jax.random.normal(key, (3, 5), dtype)},
        "down": {"kernel": jax.random.normal(key, (5, 7), dtype), "bias": jnp.zeros(7, dtype)},
    }
    sites = jlora.sites(net, params, X.astype(dtype))
    lora = jlora.init(key, params, sites, [jlora.Full(targets=".*bias"), jlora.LoRA(rank=2, targets="all-linear")])
    return params, sites, jax.tree.map(lambda x: x + 0.001, lora)


PARAMS, SITES, LORA = made()


@pytest.mark.parametrize("kind", ["llama", "llama_tied", "gpt2", "bert", "vision", "experts"])
@pytest.mark.parametrize("shard_bytes", [10**9, 300])
def test_what_is_exported_is_what_merge_gives(kind, shard_bytes, tmp_path):
    port, x = PORTS[kind](), expected(kind)["x"]
    sites, params = base_of(kind, port, x)
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2))
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    seen = []
    options = {"sites": sites, "names": port.names}
    jlora.export.save(
        tmp_path / "m", params, lora, **options, shard_bytes=shard_bytes, progress=lambda *a: seen.append(a)
    )
    again = jlora.export.load(tmp_path / "m", params, **options)
    merged = jlora.merge(params, lora)
    assert jax.tree.structure(again) == jax.tree.structure(merged)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), again, merged)
    files = sorted((tmp_path / "m").glob("*.safetensors"))
    assert (len(files) > 1) == (shard_bytes == 300)
    assert sum(len(load_file(f)) for f in files) == len(seen) == seen[-1][2]
    for tensors in map(load_file, files):
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= shard_bytes


def test_the_index_names_every_tensor(tmp_path):
    jlora.export.save(tmp_path / "m", PARAMS, LORA, sites=SITES, shard_bytes=100, config={"hidden": 3})
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (15 + 35 + 7)
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "m" / file)
    assert sorted(index["weight_map"]) == ["down.bias", "down.weight", "up.weight"]
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == {"hidden": 3}


def test_the_base_alone(tmp_path):
    assert jlora.export.save(tmp_path / "m", PARAMS, sites=SITES) == {}
    np.testing.assert_array_equal(
        load_file(tmp_path / "m" / "model.safetensors")["up.weight"], PARAMS["up"]["kernel"].T
    )


def test_leaves_may_be_left_out(tmp_path):
    jlora.export.save(tmp_path / "m", PARAMS, LORA, sites=SITES, names={"down/bias": ()})
    assert sorted(load_file(tmp_path / "m" / "model.safetensors")) == ["down.weight", "up.weight"]
    again = jlora.export.load(tmp_path / "m", PARAMS, sites=SITES, names={"down/bias": ()})
    np.testing.assert_array_equal(again["down"]["bias"], PARAMS["down"]["bias"])


def test_what_rounding_loses_is_told(tmp_path):
    params, sites, lora = made(jnp.bfloat16)
    lora = jax.tree.map(lambda x: x / 8, lora)
    options = {"sites": sites, "overwrite": True}
    lost = jlora.export.save(tmp_path / "m", params, lora, **options)
    _, wanted = jlora.merge(params, lora, report=True)
    assert lost == pytest.approx({path: float(x) for path, x in wanted.items()})
    assert lost["up/kernel"] > 0.05
    kept = jlora.export.save(tmp_path / "m", params, lora, dtype=jnp.float32, **options)
    assert max(kept.values()) < 1e-3
    assert load_file(tmp_path / "m" / "model.safetensors")["up.weight"].dtype == np.float32
    jlora.export.save(tmp_path / "m", params, lora, rounding="stochastic", key=jax.random.key(3), **options)
    assert str(load_file(tmp_path / "m" / "model.safetensors")["up.weight"].dtype) == "bfloat16"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_stochastic_rounding_keeps_the_mean(dtype):
    x = jnp.asarray([1.001, -1.001, 0.0, 3e-5, 65000.0, 1.0])
    rounded = jax.vmap(lambda k: jlora.export.stochastic_round(k, x, dtype))(jax.random.split(jax.random.key(0), 4000))
    near = [set(np.unique(np.asarray(c, np.float32)).tolist()) for c in np.asarray(rounded, np.float32).T]
    assert max(map(len, near)) == 2
    assert near[2] == {0.0}
    assert near[5] == {1.0}
    spacing = np.asarray([max(s) - min(s) for s in near])
    assert (np.abs(np.asarray(rounded, np.float32).mean(0) - x) <= 5 * spacing / 4000**0.5 + 1e-9).all()


def test_nothing_beyond_one_leaf_is_in_memory():
    """Peak memory of an export over what the base takes, counted by the system: leaves of 16 MB, of which there are 16."""
    code = """
        import resource, sys, tempfile
        import jax, jax.numpy as jnp, numpy as np
        import jlora, jlora.export
        n = 2048
        params = {f"w{i:02d}": np.full((n, n), i, np.float32) for i in range(16)}
        def fn(p, x):
            for w in p.values():
                x = x @ w
            return x
        sites = jlora.sites(fn, params, jax.ShapeDtypeStruct((1, n), jnp.float32))
        lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="w.*"))
        small = {"w": params["w00"][:64, :64].copy()}
        few = jlora.sites(lambda p, x: x @ p["w"], small, jnp.ones((1, 64)))
        tiny = jlora.init(jax.random.key(0), small, few, jlora.LoRA(rank=2, targets="w"))
        with tempfile.TemporaryDirectory() as d:  # what is loaded and compiled once
            jlora.export.save(d + "/m", small, tiny, sites=few, dtype=jnp.bfloat16)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with tempfile.TemporaryDirectory() as d:
            jlora.export.save(d + "/m", params, lora, sites=sites)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    leaf, base = 16, 256
    assert int(out.stdout) < 8 * leaf < base, out.stdout


def test_an_artifact_runs_without_jlora(tmp_path):
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 3"), jnp.float32)
    artifact = jlora.export.function(net, PARAMS, LORA, x, rank=4)
    (tmp_path / "net").write_bytes(artifact.serialize())
    flat = {}
    other = jax.tree.map(lambda x: 2 * x, LORA)
    for name, lora in {"one": LORA, "two": other}.items():
        for path, found in jlora.export.arrays(lora, rank=4).items():
            flat |= {f"{name}|{path}|{k}": np.asarray(v) for k, v in found.items()}
    save_file(flat, tmp_path / "arrays.safetensors")
    base = {"uk": PARAMS["up"]["kernel"], "dk": PARAMS["down"]["kernel"], "db": PARAMS["down"]["bias"]}
    save_file({k: np.asarray(v) for k, v in base.items()}, tmp_path / "base.safetensors")
    code = """
        import sys
        import jax, jax.export, jax.numpy as jnp
        from safetensors.numpy import load_file, save_file
        call = jax.jit(jax.export.deserialize(open(sys.argv[1] + "/net", "rb").read()).call)
        base, adapters = load_file(sys.argv[1] + "/base.safetensors"), {}
        for key, x in load_file(sys.argv[1] + "/arrays.safetensors").items():
            name, path, factor = key.split("|")
            adapters.setdefault(name, {}).setdefault(path, {})[factor] = x
        params = {"up": {"kernel": base["uk"]}, "down": {"kernel": base["dk"], "bias": base["db"]}}
        out = {name: call(params, lora, jnp.ones((5, 3))) for name, lora in adapters.items()}
        assert "jlora" not in sys.modules and call._cache_size() == 1
        save_file({k: __import__("numpy").asarray(v) for k, v in out.items()}, sys.argv[1] + "/out.safetensors")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=True)
    found = load_file(tmp_path / "out.safetensors")
    for name, lora in {"one": LORA, "two": other}.items():
        np.testing.assert_allclose(found[name], net(jlora.merge(PARAMS, lora), jnp.ones((5, 3))), rtol=1e-5)


def test_arrays_are_refused():
    with pytest.raises(ValueError, match=r"has rank 2, above 1.\n.*resize"):
        jlora.export.arrays(LORA, rank=1)


ERRORS = [
    ({"rounding": "up"}, "rounding must be 'nearest' or 'stochastic'"),
    ({"rounding": "stochastic"}, "Stochastic rounding needs a key"),
    ({"key": 0}, "Stochastic rounding needs a key, and nothing else does"),
    ({"dtype": jnp.int8}, "dtype must be one of float64, float32"),
    ({"shard_bytes": 0}, "shard_bytes must be at least 1"),
    ({"names": {"up/kernel": "down.weight"}}, "'down.weight' is the name of 'down/kernel' and 'up/kernel'"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS)
def test_saving_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        jlora.export.save(tmp_path / "m", PARAMS, LORA, sites=SITES, **options)
    assert list(tmp_path.iterdir()) == []


def test_another_base_is_refused(tmp_path):
    other = jlora.sites(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 5))}, X)
    with pytest.raises(ValueError, match="The sites were found for other parameters"):
        jlora.export.save(tmp_path / "m", PARAMS, LORA, sites=other)
    with pytest.raises(TypeError, match=r"sites must be what jlora.sites found"):
        jlora.export.save(tmp_path / "m", PARAMS, LORA, sites={})
    counted = PARAMS | {"step": jnp.zeros((), jnp.int32)}
    with pytest.raises(
        ValueError, match=r"'step' holds int32, which is no weight.\n  Leave it out: names=\{'step': \(\)\}"
    ):
        jlora.export.save(tmp_path / "m", counted, sites=jlora.sites(net, counted, X))


def test_a_failure_leaves_what_was_there(tmp_path):
    jlora.export.save(tmp_path / "m", PARAMS, sites=SITES)
    before = (tmp_path / "m" / "model.safetensors").read_bytes()

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jlora.export.save(tmp_path / "m", PARAMS, LORA, sites=SITES, overwrite=True, progress=stop)
    with pytest.raises(FileExistsError, match="already an export"):
        jlora.export.save(tmp_path / "m", PARAMS, LORA, sites=SITES)
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def damaged(change):
    def apply(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return apply


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-3])


DAMAGES = [
    (damaged(lambda t: t.pop("up.weight")), "missing: up.weight"),
    (damaged(lambda t: t.update(more=np.ones(3, np.float32))), "left over: more"),
    (
        damaged(lambda t: t.update({"up.weight": np.ones((3, 5), np.float32)})),
        r"'up.weight' has shape \(3, 5\); 'up/kernel' .* is \(5, 3\) there",
    ),
    (damaged(lambda t: t.update({"up.weight": np.full((5, 3), np.inf, np.float32)})), "'up.weight' is not finite"),
    (truncated, "was cut or added to"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_loading_is_refused(damage, message, tmp_path):
    jlora.export.save(tmp_path / "m", PARAMS, sites=SITES)
    damage(tmp_path / "m")
    with pytest.raises(ValueError, match=message):
        jlora.export.load(tmp_path / "m", PARAMS, sites=SITES)


INDEX_ERRORS = [
    ({}, "has no weight_map"),
    ({"weight_map": {"up.weight": "../evil.safetensors"}}, "names the file '../evil.safetensors', which is not beside it"),
    ({"weight_map": {"up.weight": "model.bin"}}, "which is not beside it"),
    ({"weight_map": {"up.weight": "a.safetensors"}}, "do not agree"),
]  # fmt: skip


@pytest.mark.parametrize(("index", "message"), INDEX_ERRORS)
def test_a_wrong_index_is_refused(index, message, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"down.weight": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message):
        jlora.export.load(tmp_path, PARAMS, sites=SITES)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="There are no weights at"):
        jlora.export.load(tmp_path, PARAMS, sites=SITES)


def test_a_transposed_convolution_is_refused(tmp_path):
    def fn(params, x):
        return jax.lax.conv_transpose(x, params["up"]["kernel"], (2,), "VALID")

    params = {"up": {"kernel": jnp.ones((3, 4, 4))}}
    sites = jlora.sites(fn, params, jnp.ones((1, 5, 4)))
    with pytest.raises(ValueError, match=r"'up.weight' is a transposed convolution"):
        jlora.export.save(tmp_path / "m", params, sites=sites)
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets=".*"))
    with pytest.raises(ValueError, match="a convolution in groups, or transposed"):
        jlora.peft.save(tmp_path / "a", lora)
