"""Several processes, for real: two of four CPU devices each, over gloo on the loopback address."""

import os
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

HEAD = """
    import sys
    import jax
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    short = dict(initialization_timeout=60, heartbeat_timeout_seconds=20, shutdown_timeout_seconds=20)
    jax.distributed.initialize(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), **short)
    import jax.numpy as jnp, numpy as np, jlora
    from jax.sharding import NamedSharding, PartitionSpec as P, AxisType
    me = jax.process_index()
    assert jax.device_count() == 8

    def fn(p, x):
        return jnp.tanh(x @ p["up"]) @ p["down"]

    def base(shape, kind=AxisType.Auto):
        mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(kind, kind))
        rng = np.random.default_rng(0)
        host = {"up": rng.standard_normal((16, 32)).astype("f"), "down": rng.standard_normal((32, 16)).astype("f")}
        spec = {"up": P("data", "model"), "down": P("model", "data")}
        put = lambda w, s: jax.make_array_from_callback(w.shape, NamedSharding(mesh, s), lambda i: w[i])
        return mesh, {n: put(w, spec[n]) for n, w in host.items()}, put(np.ones((8, 16), "f"), P("data"))

    def adapter(params, x, rank=4, key=0):
        rules = [jlora.LoRA(rank=rank, targets="up"), jlora.Full(targets="down")]
        return jlora.init(jax.random.key(key), params, jlora.sites(fn, params, x), rules)

    def fails(call, kind=ValueError):
        try:
            call()
        except kind as error:
            return str(error)
        raise AssertionError("nothing was raised")
"""


def start(script, count, folder, devices=4):
    """Starts ``count`` processes of a script; returns them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-c", textwrap.dedent(HEAD) + textwrap.dedent(script), f"127.0.0.1:{port}", str(count)]
    return [
        subprocess.Popen(
            [*command, str(i)], env=env, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for i in range(count)
    ]


def outputs(processes, timeout=240):
    """What each printed; raises with it if one failed, without waiting for those that wait for that one."""
    until = time.monotonic() + timeout
    with ThreadPoolExecutor(len(processes)) as pool:  # a full pipe would stop a process that nobody reads
        reading = [pool.submit(p.communicate) for p in processes]
        while any(p.poll() is None for p in processes) and time.monotonic() < until:
            if any(p.poll() for p in processes):
                until = min(until, time.monotonic() + 10)
            time.sleep(0.1)
        for p in processes:
            p.kill()
        found = [r.result()[0] for r in reading]
    wrong = [
        f"process {i} ({p.returncode}):\n{t[-4000:]}"
        for i, (p, t) in enumerate(zip(processes, found, strict=True))
        if p.returncode
    ]
    assert not wrong, "\n".join(wrong)
    return found


def test_an_adapter_of_two_processes(tmp_path):
    """Born split, the same values as on one process, saved by both, loaded on any mesh and by one process."""
    found = outputs(
        start(
            """
        mesh, params, x = base((2, 4))
        lora = adapter(params, x)
        for path, a in lora.items():
            for f, s in zip(jax.tree.leaves(a), jax.tree.leaves(jlora.shardings({path: a}, params)), strict=True):
                assert f.sharding.is_equivalent_to(s, f.ndim) and not f.is_fully_addressable
        lora = jax.jit(lambda l: jax.tree.map(lambda f: f + jnp.arange(f.size, dtype=f.dtype).reshape(f.shape) / 128, l))(lora)
        loss = jax.jit(lambda l, p, x: (jlora.wrap(fn)(p, l, x) ** 2).mean())
        value = float(loss(lora, params, x))
        merged = jlora.merge(params, lora)
        assert all(merged[n].sharding == params[n].sharding for n in params)
        same = float(jax.jit(lambda p, x: (fn(p, x) ** 2).mean())(merged, x))
        assert abs(value - same) < 1e-5 * value, (value, same)
        jlora.save("adapter", lora, step=3)
        for shape in ((2, 4), (4, 2), (8, 1), (1, 8)):
            _, other, y = base(shape)
            again = jlora.load("adapter", other)
            assert abs(float(loss(again, other, y)) - value) < 1e-5 * value
        alone = jlora.load("adapter")
        assert alone["up"].a.is_fully_addressable
        print("loss", repr(value))
    """,
            2,
            tmp_path,
        )
    )
    losses = {line for text in found for line in text.splitlines() if line.startswith("loss")}
    assert len(losses) == 1
    one = outputs(
        start(
            """
        loss = jax.jit(lambda l, p, x: (jlora.wrap(fn)(p, l, x) ** 2).mean())
        _, params, x = base((4, 2))
        lora = jlora.load("adapter", params)
        assert jlora.metadata("adapter")["meta"] == {"step": 3}
        want = jax.tree.map(lambda f: f + jnp.arange(f.size, dtype=f.dtype).reshape(f.shape) / 128, adapter(params, x))
        for a, b in zip(jax.tree.leaves(lora), jax.tree.leaves(want), strict=True):
            np.testing.assert_array_equal(a, b)
        print("loss", repr(float(loss(lora, params, x))))
    """,
            1,
            tmp_path,
            devices=8,
        )
    )
    (two,), (alone,) = (
        [float(line.split()[1]) for line in lines if line.startswith("loss")] for lines in (losses, one[0].splitlines())
    )
    assert abs(two - alone) < 1e-5 * two


LATER = {
    "start": "The processes disagree on the adapter to make",
    "use": "The processes disagree on the adapter to make",
    "key": "init takes (key, params, sites, rules)",
    "predicate": "no attribute 'nothing'",
    "shape": "init_a must return floats of shape",
    "long": "No parameter matches target",
    "abstract": "The processes disagree on the adapter to make",
    "path": "The processes disagree on the folder",
    "none": "The folder of the adapter comes first",
    "base": "The adapter was made for another base",
    "where": "The processes disagree on the folder",
    "replicas": "The processes disagree on the adapter",
}


def test_every_process_learns_of_an_error_at_once(tmp_path):
    """Adapters that differ, a value that is not finite on one of them, a folder that one may not write: each raises on both."""
    found = outputs(
        start(
            """
        mesh, params, x = base((2, 4))
        lora = adapter(params, x)
        jlora.save("adapter", lora)
        print("other rank:", fails(lambda: adapter(params, x, rank=4 + me)))
        print("one rule:", fails(lambda: adapter(params, x, rank=4 + 100 * me)))
        print("other key:", fails(lambda: adapter(params, x, key=me)))
        print("exists:", fails(lambda: jlora.save("adapter", lora), FileExistsError))
        print("rank:", fails(lambda: jlora.save("other", lora, note=me)))
        alone = {n: jnp.asarray(np.ones(w.shape, "f")) for n, w in params.items()}
        mine = adapter(alone, jnp.ones((2, 16)), key=me)
        print("values:", fails(lambda: jlora.save("other", mine)))
        put = lambda w, i: w.at[(0,) * w.ndim].set(jnp.nan) if me == 1 else w
        bad = {n: jax.tree.map(lambda w: put(w, 0), a) for n, a in mine.items()}
        print("finite:", fails(lambda: jlora.save("other", bad)))
        same = adapter(alone, jnp.ones((2, 16)))
        jlora.save("local", same)
        again = jlora.load("local", alone)
        assert all((a == b).all() for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(again), strict=True))
        import os
        assert not os.path.exists("other")
        print("missing:", fails(lambda: jlora.load("nowhere"), FileNotFoundError))
        # What only one of them meets, whatever it is: the other must not wait.
        site = jlora.sites(fn, params, x)
        rule = lambda **more: jlora.LoRA(**{"rank": 4, "targets": "up"} | more)
        make = lambda rules, key=jax.random.key(0), fn=fn: jlora.init(key, params, jlora.sites(fn, params, x), rules)
        mine = lambda bad, good: bad if me else good
        print("start:", fails(lambda: make(rule(init_a=mine("normal", "uniform")))))
        print("use:", fails(lambda: make(rule(), fn=mine(lambda p, x: jnp.tanh(x @ p["down"].T) @ p["up"].T, fn))))
        print("key:", fails(lambda: make(rule(), key=mine(3, jax.random.key(0))), TypeError))
        print("predicate:", fails(lambda: make(rule(targets=mine(lambda s: s.nothing, lambda s: s.path == "up"))), AttributeError))
        print("shape:", fails(lambda: make(rule(init_a=lambda key, shape, dtype: jnp.ones(mine((1,), shape), dtype)))))
        print("long:", fails(lambda: make(rule(targets=mine("字" * 1500, "up")))))
        shapes = jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding), params)
        print("abstract:", fails(lambda: jlora.init(jax.random.key(me), shapes, site, rule())))
        print("path:", fails(lambda: jlora.save(f"other{me}", lora)))
        print("none:", fails(lambda: jlora.save(mine(None, "other"), lora), TypeError))
        print("base:", fails(lambda: jlora.load("adapter", mine({"w": jnp.ones(3)}, params))))
        print("where:", fails(lambda: jlora.load(mine("nowhere", "adapter"), params)))
        whole = NamedSharding(mesh, P())
        differ = jax.make_array_from_callback((4,), whole, lambda i: np.full(4, me, "f"))
        print("replicas:", fails(lambda: jlora.save("other", {"up": jlora.FullWeight(differ, lora["up"].base)})))
        jlora.save("adapter", lora, overwrite=True)
    """,
            2,
            tmp_path,
        )
    )
    for text in found:
        lines = dict(
            line.split(":", 1)
            for line in text.splitlines()
            if line.split(":")[0]
            in ("exists", "other rank", "one rule", "other key", "rank", "values", "finite", "missing", *LATER)
        )
        for name, message in LATER.items():
            assert message in lines[name]
        assert "The processes disagree on the adapter to make" in lines["other rank"]
        assert "The processes disagree on the adapter to make" in lines["other key"]
        assert "Rank 104 is above 16" in lines["one rule"]
        assert "already an adapter" in lines["exists"]
        assert "The processes disagree on the adapter" in lines["rank"]
        assert "The processes disagree on the adapter" in lines["values"]
        assert "is not finite" in lines["finite"]
        assert "no adapter at" in lines["missing"]
    assert "Process 1:" in found[0]
