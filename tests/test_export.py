"""Merged exports: what is written is the merged base, under PyTorch's names, leaf by leaf; artifacts run without jlora."""

import importlib.util
import io
import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_case import base_of, expected
from peft_case import promotion as promotion
from peft_models import PORTS
from safetensors.numpy import load_file, save_file

import jlora
import jlora.export
import jlora.peft
from jlora import _files
from jlora.peft import Weight


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
    low = {path: x for path, x in LORA.items() if path != "down/bias"}
    jlora.export.save(tmp_path / "m", PARAMS, low, sites=SITES, names={"down/bias": ()})
    assert sorted(load_file(tmp_path / "m" / "model.safetensors")) == ["down.weight", "up.weight"]
    again = jlora.export.load(tmp_path / "m", PARAMS, sites=SITES, names={"down/bias": ()})
    np.testing.assert_array_equal(again["down"]["bias"], PARAMS["down"]["bias"])


@pytest.mark.parametrize(
    "names", [{"down/bias": None}, lambda path: None if path == "down/bias" else path.replace("/", ".")]
)
def test_a_name_that_is_none_leaves_the_leaf_out(names, tmp_path):
    low = {path: x for path, x in LORA.items() if path != "down/bias"}
    jlora.export.save(tmp_path / "m", PARAMS, low, sites=SITES, names=names)
    assert len(load_file(tmp_path / "m" / "model.safetensors")) == 2
    again = jlora.export.load(tmp_path / "m", PARAMS, sites=SITES, names=names)
    np.testing.assert_array_equal(again["down"]["bias"], PARAMS["down"]["bias"])


@pytest.mark.parametrize("nothing", [None, (), []])
def test_an_adapted_leaf_is_not_left_out(nothing, tmp_path):
    names = {"up/kernel": nothing}
    for save in (lambda: jlora.export.save(tmp_path / "m", PARAMS, LORA, sites=SITES, names=names),
                 lambda: jlora.peft.save(tmp_path / "m", LORA, names=names)):  # fmt: skip
        with pytest.raises(ValueError, match=r"'up/kernel' is adapted, but names gives it no name.*\n  Give it one"):
            save()
    assert list(tmp_path.iterdir()) == []


def test_scalars_stay_scalars(tmp_path):
    tensors = {"scale": np.float32(3), "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T}
    _files.write_safetensors(tmp_path / "x.safetensors", tensors)
    found = _files.Safetensors(tmp_path / "x.safetensors")
    assert found.header["scale"].shape == ()
    for name, x in tensors.items():
        np.testing.assert_array_equal(found.read(name), x)


def test_what_was_trained_outright_is_stored_as_it_is(tmp_path):
    params = PARAMS | {"down": PARAMS["down"] | {"bias": jnp.full(7, 1e4)}}  # W + (value - W) would round
    value = jnp.linspace(0.1, 0.2, 7)
    lora = LORA | {"down/bias": replace(LORA["down/bias"], value=value)}
    jlora.export.save(tmp_path / "m", params, lora, sites=SITES)
    np.testing.assert_array_equal(load_file(tmp_path / "m" / "model.safetensors")["down.bias"], value)


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


VALUES = {  # of fp32: subnormal numbers of it, of the narrow dtype and around its smallest, ordinary ones, the largest
    "bfloat16": [1.001, -1.001, 0.0, 1.0, 3.3895e38, 3e-42, -1.3e-40, 9.1e-41, 1e-39, 1.1754942e-38],
    "float16": [1.001, -1.001, 0.0, 1.0, 65000.3, 3e-5, 6e-8, -2e-8, 1e-9, -3e-10, 6.1035e-5, 6.103e-5],
}


@pytest.mark.parametrize("dtype", VALUES)
def test_stochastic_rounding_keeps_the_mean(dtype):
    x, n = np.asarray(VALUES[dtype], np.float32), 4000
    rounded = rounded_often(x, dtype, n)
    for value, several in zip(x.astype(float), rounded.T, strict=True):
        below, above = neighbours(value, dtype)
        assert set(several.tolist()) <= {below, above}
        share = (value - below) / (above - below) if above > below else 0.0
        spread = (above - below) * (share * (1 - share) / n) ** 0.5
        assert abs(several.mean() - value) <= 5 * spread + (above - below) / n  # what is rare need not come up


def test_stochastic_rounding_of_what_no_narrow_number_is_near():
    edges = np.asarray([np.inf, -np.inf, 1e30, 65519.0, 65521.0, 0.0, 1e-40], np.float32)
    rounded = rounded_often(edges, "float16", 50)
    assert [sorted(set(x)) for x in rounded.T.tolist()] == [[np.inf], [-np.inf], [np.inf], [65504], [np.inf], [0], [0]]
    assert np.isnan(rounded_often(np.asarray([np.nan], np.float32), "bfloat16", 3)).all()
    with jax.enable_x64(True):
        wide = rounded_often(np.asarray([1 + 1e-8, 1e-46, -3e-39, 1e300, 1e-300]), "float32", 4000)
    ulp, least = 2.0**-23, 2.0**-149
    assert set(wide[:, 0].tolist()) == {1.0, 1 + ulp}
    assert abs(wide[:, 0].mean() - 1 - 1e-8) < 5 * ulp / 2 / 4000**0.5
    assert set(wide[:, 1].tolist()) == {0.0, least}
    assert abs(wide[:, 1].mean() - 1e-46) < 5 * least / 2 / 4000**0.5
    assert len(set(wide[:, 2].tolist())) == 2
    assert (set(wide[:, 3].tolist()), set(wide[:, 4].tolist())) == ({np.inf}, {0.0})
    with pytest.raises(ValueError, match="float32 is not narrower than float32"):
        jlora.export.stochastic_round(jax.random.key(0), jnp.ones(3), jnp.float32)


def rounded_often(x, dtype, n):
    """Rounded with ``n`` keys; NumPy makes fp64 of it, which keeps subnormal numbers."""
    keys = jax.random.split(jax.random.key(0), n)
    many = jax.vmap(lambda k: jlora.export.stochastic_round(k, jnp.asarray(x), dtype))(keys)
    return np.asarray(many).astype(np.float64)


def neighbours(value, dtype):
    """The numbers of ``dtype`` on both sides of ``value``; itself twice if it is one."""
    near = np.asarray(value, np.float32).astype(dtype)
    side = (
        np.nextafter(near, np.asarray(np.sign(value - float(near)) * np.inf, dtype)) if value != float(near) else near
    )
    return min(float(near), float(side)), max(float(near), float(side))


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


def test_what_jax_does_not_serialise_is_refused(monkeypatch):
    def fn(params, x):
        return x["in"][0] @ params["layers"][0]

    params, x = {"layers": {0: jnp.ones((3, 5))}}, {"in": {0: X}}
    lora = jlora.init(jax.random.key(0), params, jlora.sites(fn, params, x), jlora.LoRA(rank=2, targets="layers/0"))
    with pytest.raises(
        ValueError, match=r"only dicts whose keys are strings.\n  got: 0 in 'layers/0' of params\n.*str\(key\)"
    ):
        jlora.export.function(fn, params, lora, x)
    named = {"layers": [params["layers"][0]]}
    with pytest.raises(ValueError, match=r"got: 0 in '0/in/0' of args"):
        jlora.export.function(fn, named, lora, x)
    jlora.export.function(fn, named, lora, {"in": [X]}).serialize()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'flatbuffers is missing.*\n  pip install "jlora\[peft\]"'):
        jlora.export.function(fn, named, lora, {"in": [X]})


def test_arrays_are_refused():
    with pytest.raises(ValueError, match=r"has rank 2, above 1.\n.*resize"):
        jlora.export.arrays(LORA, rank=1)


ERRORS = [
    ({"rounding": "up"}, "rounding must be 'nearest' or 'stochastic'"),
    ({"rounding": "stochastic"}, "Stochastic rounding needs a key"),
    ({"key": 0}, "Stochastic rounding needs a key, and nothing else does"),
    ({"dtype": jnp.int8}, "dtype must be one of float64, float32"),
    ({"shard_bytes": 0}, "shard_bytes must be at least 1"),
    ({"lora": jax.tree.map(lambda x: 1e30 * x, LORA), "dtype": jnp.float16}, "has values that float16 cannot hold"),
    ({"names": {"up/kernel": "down.weight"}}, "'down.weight' is the name of 'down/kernel' and 'up/kernel'"),
]


@pytest.mark.parametrize(("options", "message"), ERRORS)
def test_saving_is_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        jlora.export.save(tmp_path / "m", PARAMS, **({"lora": LORA, "sites": SITES} | options))
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
        (folder / "checksums.json").unlink()
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


def with_buffers(folder, **tensors):
    """The weights of ``net``, with integers beside them."""
    jlora.export.save(folder, PARAMS, sites=SITES, overwrite=True)
    damaged(lambda t: t.update(tensors))(folder)


POSITIONS = {"position_ids": np.arange(5)[None], "mask": np.asarray([True, False])}


def test_integers_of_a_base_that_the_tree_does_not_have(tmp_path):
    with_buffers(tmp_path / "m", **POSITIONS)
    with pytest.raises(ValueError, match=r"left over: mask, position_ids; .*ignore="):
        jlora.export.load(tmp_path / "m", PARAMS, sites=SITES)
    for ignore in (["mask", "position_ids"], r"(mask|.*_ids)"):
        again = jlora.export.load(tmp_path / "m", PARAMS, sites=SITES, ignore=ignore)
        jax.tree.map(np.testing.assert_array_equal, again, PARAMS)
    with pytest.raises(ValueError, match=r"No tensor has the name 'positions' of ignore.\n  nearest: position_ids"):
        jlora.export.load(tmp_path / "m", PARAMS, sites=SITES, ignore=["mask", "positions"])
    with pytest.raises(ValueError, match=r"ignore='\(' is not a regular expression"):
        jlora.export.load(tmp_path / "m", PARAMS, sites=SITES, ignore="(")


def test_integers_of_a_base_go_into_leaves_of_integers(tmp_path):
    with_buffers(tmp_path / "m", **POSITIONS)
    more = {"position_ids": jnp.zeros((1, 5), jnp.int32), "mask": jnp.zeros(2, bool)}
    again = loaded(tmp_path / "m", more)
    assert again["position_ids"].tolist() == [[0, 1, 2, 3, 4]]
    assert again["mask"].tolist() == [True, False]
    assert (again["position_ids"].dtype, again["mask"].dtype) == (np.int32, bool)
    with pytest.raises(ValueError, match="'position_ids' holds int64; 'position_ids' is float32"):
        loaded(tmp_path / "m", more | {"position_ids": jnp.zeros((1, 5))})
    with pytest.raises(ValueError, match="'mask' holds bool; 'mask' is int32"):
        loaded(tmp_path / "m", more | {"mask": jnp.zeros(2, jnp.int32)})


def test_no_integer_is_cut(tmp_path):
    big = np.asarray([2**40, -(2**62) - 1])
    with_buffers(tmp_path / "m", ids=big)
    with pytest.raises(ValueError, match="'ids' has integers of int64 that 'ids' cannot hold in int32"):
        loaded(tmp_path / "m", {"ids": jnp.zeros(2, jnp.int32)})
    with pytest.raises(ValueError, match="'ids' has integers of int64 that 'ids' cannot hold in uint64"):
        loaded(tmp_path / "m", {"ids": np.zeros(2, np.uint64)})
    again = loaded(tmp_path / "m", {"ids": np.zeros(2, np.int64)})["ids"]
    assert isinstance(again, np.ndarray)  # JAX has 32 bits here
    np.testing.assert_array_equal(again, big)


def loaded(folder, more):
    params = PARAMS | more
    return jlora.export.load(folder, params, sites=jlora.sites(net, params, X))


def test_other_dtypes_of_the_format_are_copied_but_not_read(tmp_path):
    header = {"four": {"dtype": "F4", "shape": [3, 2], "data_offsets": [0, 3]}}
    header["eight"] = {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [3, 7]}
    raw = json.dumps(header).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(raw).to_bytes(8, "little") + raw + b"abcdefg")
    found, out = _files.Safetensors(file, _files.BITS), io.BytesIO()
    for name in ("eight", "four"):
        found.copy(name, out)
    assert out.getvalue() == b"defgabc"
    with pytest.raises(ValueError, match=r"'four' in .* holds F4, which is not read here"):
        found.read("four")
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(ValueError, match="was changed while it was read"):
        found.copy("eight", out)


INDEX_ERRORS = [
    ({}, "has no weight_map"),
    ({"weight_map": {}}, "has no weight_map"),
    ({"weight_map": {"down.weight": "a.safetensors", "b": "b.safetensors"}}, "'down.weight' is in two files of"),
    ({"weight_map": {"up.weight": "../evil.safetensors"}}, "names the file '../evil.safetensors', which is not beside it"),
    ({"weight_map": {"up.weight": "model.bin"}}, "which is not beside it"),
    ({"weight_map": {"up.weight": "a.safetensors"}}, "do not agree"),
]  # fmt: skip


@pytest.mark.parametrize(("index", "message"), INDEX_ERRORS)
def test_a_wrong_index_is_refused(index, message, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in "ab":
        save_file({"down.weight": np.ones(3, np.float32)}, tmp_path / f"{file}.safetensors")
    with pytest.raises(ValueError, match=message):
        jlora.export.load(tmp_path, PARAMS, sites=SITES)


def test_nothing_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="There are no weights at"):
        jlora.export.load(tmp_path, PARAMS, sites=SITES)


def torch_transposed(x, w, stride):
    """``nn.ConvTranspose1d`` as it is defined: each input adds the kernel, times itself, to the outputs from ``stride`` times its place."""
    out = np.zeros((len(x), w.shape[1], stride * (x.shape[2] - 1) + w.shape[2]))
    for i in range(x.shape[2]):
        out[:, :, stride * i : stride * i + w.shape[2]] += np.einsum("bc,cok->bok", x[:, :, i], w)
    return out


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_transposed_convolutions(stride, transpose_kernel, tmp_path):
    model = nn.ConvTranspose(5, (4,), (stride,), "VALID", use_bias=False, transpose_kernel=transpose_kernel)
    x = jax.random.normal(jax.random.key(0), (2, 6, 3))
    params = model.init(jax.random.key(1), x)["params"]
    fn = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
    sites = jlora.sites(fn, params, x)
    names = {"kernel": Weight("up.weight", transposed="as_is" if transpose_kernel else "reversed")}
    lora = jax.tree.map(
        lambda x: x + 0.1, jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="kernel"))
    )
    jlora.export.save(tmp_path / "m", params, lora, sites=sites, names=names)
    w = load_file(tmp_path / "m" / "model.safetensors")["up.weight"]
    assert w.shape == (3, 5, 4)
    theirs = np.moveaxis(torch_transposed(np.moveaxis(x, -1, 1), w, stride), 1, -1)
    np.testing.assert_allclose(jlora.wrap(fn)(params, lora, x), theirs, atol=1e-5)
    again = jlora.export.load(tmp_path / "m", params, sites=sites, names=names)
    np.testing.assert_allclose(again["kernel"], jlora.merge(params, lora)["kernel"], atol=1e-6)
    with pytest.raises(ValueError, match="transposed"):
        jlora.peft.save(tmp_path / "a", lora, names=names)


@pytest.mark.parametrize("names", [("NHWC", "WHIO", "NHWC"), ("NCHW", "HOWI", "NHWC"), ("NWHC", "HWIO", "NWCH")])
def test_a_kernels_spatial_axes_are_in_the_order_of_the_input(names, tmp_path):
    """As PyTorch has them: (n, c, h, w) goes with (o, i, h, w), in whatever order the kernel lies here."""
    sizes = {"O": 6, "I": 4, "H": 3, "W": 2}
    params = {"conv": {"kernel": jax.random.normal(jax.random.key(0), [sizes[c] for c in names[1]])}}
    x = jax.random.normal(jax.random.key(1), [{"N": 2, "C": 4, "H": 7, "W": 5}[c] for c in names[0]])
    fn = lambda p, x: jax.lax.conv_general_dilated(x, p["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=names)  # noqa: E731
    sites = jlora.sites(fn, params, x)
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, alpha=2, targets=".*"))
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    jlora.export.save(tmp_path / "m", params, lora, sites=sites)
    jlora.export.save(tmp_path / "base", params, sites=sites)
    merged, base = (load_file(tmp_path / f / "model.safetensors")["conv.weight"] for f in ("m", "base"))
    first, second = (c for c in names[0] if c in "HW")
    assert merged.shape == (6, 4, sizes[first], sizes[second])
    # PyTorch's conv2d, on the input with its spatial axes in the order it has them.
    channels = x if names[0][1] == "C" else jnp.moveaxis(x, 3, 1)
    theirs = jax.lax.conv(channels, jnp.asarray(merged), (1, 1), "VALID")
    ours = jlora.wrap(fn)(params, lora, x).transpose([names[2].index(c) for c in ("N", "C", first, second)])
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    jlora.peft.save(tmp_path / "a", lora)
    factors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    a, b = (next(x for name, x in factors.items() if f"lora_{f}" in name) for f in "AB")
    np.testing.assert_allclose(np.einsum("rchw,or->ochw", a, b[..., 0, 0]), merged - base, atol=1e-6)
    again = jlora.peft.load(tmp_path / "a", sites)
    np.testing.assert_allclose(jlora.delta(again)["conv/kernel"], jlora.delta(lora)["conv/kernel"], atol=1e-6)


def test_a_transposed_convolution_has_to_be_said(tmp_path):
    x = jnp.ones((1, 5, 4))
    params = {"up": {"kernel": jnp.ones((3, 4, 4))}}
    fn = lambda p, x: jax.lax.conv_transpose(x, p["up"]["kernel"], (2,), "VALID")  # noqa: E731
    sites = jlora.sites(fn, params, x)
    with pytest.raises(
        ValueError, match=r"'up.weight' is a transposed convolution.*\n  Say how: .*transposed='reversed'"
    ):
        jlora.export.save(tmp_path / "m", params, sites=sites)
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets=".*"))
    with pytest.raises(ValueError, match="a convolution in groups, or transposed"):
        jlora.peft.save(tmp_path / "a", lora)
    names = {"up/kernel": Weight("up.weight", transposed="reversed")}
    plain = {"up": {"kernel": jnp.ones((4, 4))}}
    used = jlora.sites(lambda p, x: x @ p["up"]["kernel"], plain, x)
    with pytest.raises(ValueError, match=r"Weight\('up.weight', transposed=...\) is for a convolution"):
        jlora.export.save(tmp_path / "m", plain, sites=used, names=names)

    def grouped(p, x):
        return jax.lax.conv_general_dilated(
            x, p["up"]["kernel"], (1,), [(2, 2)], lhs_dilation=dilation, dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=2,
        )  # fmt: skip

    for dilation in ((1,), (2,)):
        params = {"up": {"kernel": jnp.ones((3, 2, 4))}}
        with pytest.raises(ValueError, match="is a transposed convolution in groups"):
            jlora.export.save(tmp_path / "m", params, sites=jlora.sites(grouped, params, x), names=names)
    with pytest.raises(ValueError, match=r"Weight\(transposed=...\) must be 'reversed' or 'as_is'"):
        Weight("up.weight", transposed=True)
    assert list(tmp_path.iterdir()) == []
