"""Merged trees as orbax checkpoints: what merge and orbax write, a few leaves at a time, complete or not at all."""

import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.core import FrozenDict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from peft_case import promotion as promotion
from test_export import LORA, PARAMS, made

import jlora
import jlora.export
from jlora import _hosts, _orbax


def restored(folder, *target):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder, *target)


def written(folder, params):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, params)
    return restored(folder)


def same(one, two):
    """The same tree of the same kinds of arrays, bit for bit."""
    assert jax.tree.structure(one) == jax.tree.structure(two)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert isinstance(x, np.ndarray) == isinstance(y, np.ndarray)
        assert (x.dtype, x.shape, getattr(x, "sharding", None)) == (y.dtype, y.shape, getattr(y, "sharding", None))
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


LOW = {"up/kernel": LORA["up/kernel"]}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_what_merge_and_orbax_write(dtype, tmp_path):
    params, _, lora = made(dtype)
    seen = []
    lost = jlora.export.save_orbax(tmp_path / "m", params, lora, progress=lambda *a: seen.append(a))
    merged, wanted = jlora.merge(params, lora, report=True)
    same(restored(tmp_path / "m"), written(tmp_path / "n", merged))
    same(restored(tmp_path / "m", merged), merged)
    assert lost == pytest.approx({path: float(x) for path, x in wanted.items()}, abs=1e-5)
    assert [x[1:] for x in seen] == [(1, 3), (2, 3), (3, 3)]
    assert sorted(x[0] for x in seen) == ["down/bias", "down/kernel", "up/kernel"]
    names = [sorted(p.name for p in (tmp_path / folder).iterdir()) for folder in "mn"]
    assert set(names[0]) <= set(names[1]) | {"commit_success.txt"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "n"]


def test_trees_of_any_kind(tmp_path):
    trees = [
        FrozenDict({"a": {"b": jnp.ones(3)}, "c": ()}),
        {"list": [jnp.arange(3), {"x/y": jnp.ones((), jnp.bfloat16)}], "none": None, "empty": {}},
        {"host": np.arange(4), "scalar": np.float32(2), "device": jnp.ones(2, bool)},
    ]
    for i, tree in enumerate(trees):
        assert jlora.export.save_orbax(tmp_path / str(i), tree) == {}
        same(
            jax.tree.map(np.asarray, restored(tmp_path / str(i))),
            jax.tree.map(np.asarray, written(tmp_path / f"n{i}", tree)),
        )
    assert isinstance(restored(tmp_path / "2")["host"], np.ndarray)


def test_shardings_are_kept(tmp_path):
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    params = {"w": jax.random.normal(jax.random.key(0), (8, 6)), "v": jax.random.normal(jax.random.key(1), (6, 4))}
    fn = lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"]  # noqa: E731
    lora = jlora.init(
        jax.random.key(0), params, jlora.sites(fn, params, jnp.ones((2, 8))), jlora.LoRA(rank=2, targets="w")
    )
    lora = jax.tree.map(lambda x: x + 0.1, lora)
    split = {"w": P("x", "y"), "v": P(None, "x")}
    params = {k: jax.device_put(x, NamedSharding(mesh, split[k])) for k, x in params.items()}
    jlora.export.save_orbax(tmp_path / "m", params, lora)
    merged = jlora.merge(params, lora)
    same(restored(tmp_path / "m"), written(tmp_path / "n", merged))
    assert {k: x.sharding.spec for k, x in restored(tmp_path / "m").items()} == split


@pytest.mark.parametrize("enough", [0, 40, 10**9])
def test_leaves_that_are_written_together(enough, tmp_path, monkeypatch):
    """At most as many bytes as the largest leaf has, or as are enough, and in every case all of them."""
    monkeypatch.setattr(_orbax, "ENOUGH", enough)
    groups, make = [], _orbax._Turns.made
    monkeypatch.setattr(_orbax._Turns, "made", lambda self, xs: groups.append(xs) or make(self, xs))
    tree = {f"w{i}": jnp.full(n, i, jnp.float32) for i, n in enumerate((5, 1, 1, 7, 2, 2, 2, 6))}
    jlora.export.save_orbax(tmp_path / "m", tree)
    same(restored(tmp_path / "m"), tree)
    sizes = [sum(x.nbytes for x in group) for group in groups]
    assert sum(sizes) == 4 * 26
    assert max(sizes) <= max(enough, 28)
    assert (len(sizes) == 1) == (enough == 10**9)


def test_rounding(tmp_path):
    lost = jlora.export.save_orbax(tmp_path / "m", PARAMS, LORA, dtype=jnp.bfloat16)
    assert {str(x.dtype) for x in jax.tree.leaves(restored(tmp_path / "m"))} == {"bfloat16"}
    assert max(lost.values()) > 0.1
    options = {"dtype": jnp.bfloat16, "rounding": "stochastic", "key": jax.random.key(0), "overwrite": True}
    jlora.export.save_orbax(tmp_path / "m", PARAMS, LORA, **options)
    once = restored(tmp_path / "m")
    jlora.export.save_orbax(tmp_path / "m", PARAMS, LORA, **options)
    same(restored(tmp_path / "m"), once)


def test_a_failure_leaves_what_was_there(tmp_path):
    jlora.export.save_orbax(tmp_path / "m", PARAMS)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jlora.export.save_orbax(tmp_path / "m", PARAMS, LORA, overwrite=True, progress=stop)
    huge = jax.tree.map(lambda x: 1e30 * x, LORA)
    with pytest.raises(ValueError, match=r"has values that float16 cannot hold"):
        jlora.export.save_orbax(tmp_path / "m", PARAMS, huge, dtype=jnp.float16, overwrite=True)
    with pytest.raises(FileExistsError, match="already a checkpoint at"):
        jlora.export.save_orbax(tmp_path / "m", PARAMS)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a checkpoint: it is left alone"):
        jlora.export.save_orbax(tmp_path / "other", PARAMS, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "other"]


def test_a_full_disk_is_an_error_of_the_system(tmp_path):
    """A limit on the size of files stands for it."""
    code = """
        import resource, signal, sys
        import jax.numpy as jnp, jlora.export
        jlora.export.save_orbax(sys.argv[1] + "/a", {"w": jnp.ones((4, 4))})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        import jax
        try:
            jlora.export.save_orbax(sys.argv[1] + "/b", {"w": jax.random.normal(jax.random.key(0), (400, 400))})
        except OSError as error:
            print(type(error).__name__, error)
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code), tmp_path], capture_output=True, text=True)
    assert "The checkpoint could not be saved" in out.stdout, out.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_saving_is_refused(tmp_path):
    cases = [
        ({"w": jnp.ones((0, 3))}, r"'w' \(0, 3\) is empty, which orbax does not save"),
        ({"w": jnp.ones(3), "n": 3}, "'n' is no array of numbers.\n  got: int"),
        ({"w": jax.ShapeDtypeStruct((3,), jnp.float32)}, "'w' is no array of numbers.\n  got: ShapeDtypeStruct"),
        ({"w": jnp.ones(3), "key": jax.random.key(0)}, "'key' is no array of numbers"),
    ]
    for params, message in cases:
        with pytest.raises(ValueError, match=message):
            jlora.export.save_orbax(tmp_path / "m", params)
    with pytest.raises(ValueError, match=r"base"):
        jlora.export.save_orbax(tmp_path / "m", {"w": jnp.ones(3)}, LORA)
    with pytest.raises(ValueError, match="Stochastic rounding needs a key"):
        jlora.export.save_orbax(tmp_path / "m", PARAMS, rounding="stochastic")
    assert list(tmp_path.iterdir()) == []


def test_a_tree_of_several_processes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(_hosts, "spans", lambda x: True)
    with pytest.raises(ValueError, match=r"'down/bias' is spread over processes.\n.*jlora.merge\(params, lora\)"):
        jlora.export.save_orbax(tmp_path / "m", PARAMS, LORA)
    assert list(tmp_path.iterdir()) == []


def test_no_second_copy_of_the_base_is_in_memory():
    """Peak memory of an export over what the base takes, counted by the system: leaves of 16 MB, of which there are 24."""
    code = """
        import resource, tempfile
        import jax, jax.numpy as jnp, numpy as np
        import jlora, jlora.export
        n = 2048
        def fn(p, x):
            for w in p.values():
                x = x @ w
            return x
        def save(count, n):
            rows = np.random.default_rng(0).standard_normal(n, np.float32)
            params = {f"w{i:02d}": np.outer(rows, rows + i) for i in range(count)}
            sites = jlora.sites(fn, params, jax.ShapeDtypeStruct((1, n), jnp.float32))
            lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="w.*"))
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with tempfile.TemporaryDirectory() as d:
                jlora.export.save_orbax(d + "/m", params, lora)
            return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        save(1, 64)  # what is loaded and compiled once
        print(save(24, n))
    """
    out = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    leaf, base = 16, 24 * 16
    assert int(out.stdout) < 14 * leaf < base, out.stdout
