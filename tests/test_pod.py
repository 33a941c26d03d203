"""examples/pod.py in several processes: the same numbers on any mesh, and after any process was killed. Needs the ``pod`` extra."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("grain", reason='examples/pod.py needs pip install -e ".[pod]"')
pytest.importorskip("rich", reason='examples/pod.py needs pip install -e ".[pod]"')

import jlora

SCRIPT = Path(__file__).parent.parent / "examples" / "pod.py"
STEPS = 9
CACHE = tempfile.TemporaryDirectory()


def start(out, *options, local=2, mesh="2x4", devices=4, save_every=3):
    command = [sys.executable, "-u", str(SCRIPT), "--local", str(local), "--mesh", mesh, "--devices", str(devices)]
    command += [
        "--steps",
        str(STEPS),
        "--save-every",
        str(save_every),
        "--length",
        "32",
        "--timeout",
        "30",
        "--out",
        str(out),
    ]
    # Most of the time here is XLA's: it optimises nothing, and what one run compiled the next need not.
    cache = {"JAX_COMPILATION_CACHE_DIR": CACHE.name, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1"}
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0"} | cache
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def finish(child, timeout=300):
    """What it printed, and its exit code."""
    try:
        text, _ = child.communicate(timeout=timeout)
    finally:
        child.kill()
    return text, child.returncode


def complete(out):
    text, code = finish(start(out))
    assert code == 0, text
    return text


def losses(out):
    return json.loads((out / "results.json").read_text())["losses"]


def arrays(out):
    return [np.asarray(x) for x in jax.tree.leaves(jlora.load(out / "adapter"))]


def wait_for(what, child, seconds=120):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and child.poll() is None:
        found = what()
        if found:
            return found
        time.sleep(0.002)
    child.kill()
    raise AssertionError(f"it did not come to that: {child.communicate()[0]}")


def kill_one(out):
    os.kill(json.loads((out / "processes.json").read_text())[1], signal.SIGKILL)


def assert_goes_on(out, whole):
    """The same command continues from a complete checkpoint and ends where a run that was never killed does, bit for bit."""
    assert "Resumed" in complete(out)
    assert losses(out) == losses(whole)
    for got, want in zip(arrays(out), arrays(whole), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    text = complete(out)
    assert "Processes: 2; devices: 8 (cpu); mesh 2x4" in text
    before, after = (float(x) for x in text.split("Held-out perplexity")[1].splitlines()[0].split(" -> "))
    assert after < 0.8 * before
    return out


@pytest.mark.parametrize(("local", "devices", "mesh"), [(1, 8, "8x1"), (1, 1, "1x1")])
def test_the_same_losses_on_any_mesh(whole, tmp_path, local, devices, mesh):
    text, code = finish(start(tmp_path, local=local, devices=devices, mesh=mesh))
    assert code == 0, text
    np.testing.assert_allclose(losses(tmp_path), losses(whole), rtol=1e-5)


def test_a_process_killed_in_a_step(whole, tmp_path):
    child = start(tmp_path)
    wait_for((tmp_path / "checkpoints" / "3").exists, child)
    killed = time.monotonic()
    kill_one(tmp_path)
    text, code = finish(child)
    assert code != 0
    assert time.monotonic() - killed < 75, "the others have to notice within the timeout"
    assert "process 1 ended with -9" in text
    assert_goes_on(tmp_path, whole)


def test_a_process_killed_in_a_save(whole, tmp_path):
    child = start(tmp_path, save_every=1)
    folder = tmp_path / "checkpoints"

    def saving():
        return folder.exists() and [p for p in folder.iterdir() if "tmp" in p.name and int(p.name.split(".")[0]) >= 3]

    wait_for(saving, child)
    kill_one(tmp_path)
    text, code = finish(child)
    assert code != 0, text
    assert_goes_on(tmp_path, whole)


def test_a_signal_saves_and_another_number_of_processes_goes_on(whole, tmp_path):
    child = start(tmp_path, save_every=1)
    wait_for((tmp_path / "checkpoints" / "2").exists, child)
    child.send_signal(signal.SIGTERM)
    text, code = finish(child)
    assert code == 143, text
    assert "Stopped by a signal: saved after step" in text
    text, code = finish(start(tmp_path, local=4, devices=2, mesh="4x2"))
    assert code == 0, text
    assert "Resumed" in text
    np.testing.assert_allclose(losses(tmp_path), losses(whole), rtol=1e-5)


def test_a_checkpoint_of_two_processes_is_restored_onto_any_mesh(whole):
    """Adapter and optimiser bit for bit, onto eight devices in several ways and onto one."""
    import assets
    import optax
    import pod

    args = pod.parse(["--out", str(whole), "--length", "32"])
    _, params, _ = assets.load_glassllm()
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, STEPS))
    found = []
    with contextlib.closing(pod.open_manager(args)) as manager:
        for shape in ((2, 4), (8, 1), (4, 2), (1, 1)):
            kinds = (jax.sharding.AxisType.Auto,) * 2
            mesh = jax.make_mesh(
                shape, ("data", "model"), axis_types=kinds, devices=jax.devices()[: shape[0] * shape[1]]
            )
            state, about = pod.restore(manager, optimizer, pod.place(params, mesh))
            kernel = state["lora"]["params/blocks_0/attention/query/kernel"].a
            assert kernel.sharding.mesh.shape == mesh.shape
            assert len(about["losses"]) == STEPS
            found.append([np.asarray(x) for x in jax.tree.leaves(state)])
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            np.testing.assert_array_equal(got, want)


BAD = {
    "--rank 100000": "is above",
    "--length 100000": "--length 100000 is too long",
    "--batch 15": "--batch 15 does not divide among",
    "--process 0": "--coordinator, --processes and --process go together",
    "--loca 3": "unrecognized arguments: --loca",
}


def test_a_batch_that_is_cut_where_no_process_begins():
    """Three processes of four devices on 4x3: rows of the batch would come from two processes, and differ."""
    import pod

    rows = [slice(8 * i // 4, 8 * (i + 1) // 4) for i in range(4)]

    class Across:  # what the second process sees of NamedSharding(mesh, P("data"))
        def __init__(self, mesh, spec): ...

        def addressable_devices_indices_map(self, shape):
            return {device: (rows[device // 3],) for device in range(4, 8)}

    class Mesh:
        shape, devices = {"data": 4, "model": 3}, np.zeros((4, 3))

    job = pod.Job(pod.parse(["--batch", "8"]), Mesh, None, None, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.sharding, "NamedSharding", Across)
        with pytest.raises(pod.Stop, match="The mesh 4x3 cuts the batch where no process begins: rows 2 to 6"):
            pod.batches(job, np.zeros((100, 9), np.int32))


def test_what_cannot_be_is_refused_at_once(whole, tmp_path):
    text, code = finish(start(tmp_path / "mesh", mesh="3x2"))
    assert code == 2
    assert "--mesh 3x2 needs 6 devices, there are 8" in text
    assert "goes on" not in text
    for options, message in BAD.items():
        text, code = finish(start(tmp_path / "bad", *options.split()))
        assert (code, message in text) == (2, True), text
        assert "Traceback" not in text
    text, code = finish(start(whole, "--rank", "4"))
    assert code == 2
    assert "holds a run with other settings: rank 8 (now 4)" in text
