"""The main example as a user runs it: interrupted and resumed, diverging, run again. Needs the ``demo`` extra."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gguf", reason='examples/finetune_lm.py needs pip install -e ".[demo]"')

import jlora

SCRIPT = str(Path(__file__).parent.parent / "examples" / "finetune_lm.py")


def start(out, *options):
    command = [sys.executable, "-u", SCRIPT, "--quick", "--out", str(out), *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(child):
    with child:
        return child.communicate()[0], child.wait()


def factors(out):
    return {path: (np.asarray(x.a), np.asarray(x.b)) for path, x in jlora.load(out / "adapter").items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, *finish(start(out, "--steps", "40"))


def test_halves_the_perplexity_and_shows_it(whole):
    out, text, code = whole
    assert code == 0, text
    before, after = map(float, re.search(r"Held-out perplexity\s+([\d.]+) -> ([\d.]+)", text).groups())
    assert after < before / 2
    assert "merged and factored logits agree" in text
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_interrupt_saves_and_the_same_command_resumes_bit_for_bit(whole, tmp_path):
    with start(tmp_path / "run", "--steps", "40") as child:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "run" / "checkpoints").glob("1*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        text = child.communicate()[0]
    assert child.returncode == 130, text
    assert "Interrupted: saved after step" in text
    text, code = finish(start(tmp_path / "run", "--steps", "40"))
    assert code == 0, text
    assert "Resumed" in text
    for path, pair in factors(whole[0]).items():
        for x, y in zip(pair, factors(tmp_path / "run")[path], strict=True):
            np.testing.assert_array_equal(x, y)


def test_finished_run_is_not_overwritten(whole):
    out, *_ = whole
    stamp = (out / "adapter" / "adapter.json").stat().st_mtime_ns
    text, code = finish(start(out, "--steps", "40"))
    assert code == 0
    assert "holds this run, finished" in text
    text, code = finish(start(out, "--steps", "41"))
    assert code == 2
    assert "other settings: steps 40 (now 41)" in text
    assert (out / "adapter" / "adapter.json").stat().st_mtime_ns == stamp


def test_divergence_stops_and_says_where(tmp_path):
    text, code = finish(start(tmp_path / "run", "--lr", "1e30"))
    assert code == 1, text
    assert re.search(r"Stopped at step \d+: .*(nan|not finite|inf)", text)


def test_damaged_download_is_named(tmp_path):
    cache = tmp_path / "cache"
    env = os.environ | {"JLORA_CACHE": str(cache)}
    code = f"import sys; sys.path.insert(0, {str(Path(SCRIPT).parent)!r}); import assets; assets.load_glassllm()"
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    file = next(p for p in cache.rglob("en.npz"))
    file.write_bytes(file.read_bytes()[:-1])
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert child.returncode != 0
    assert "en.npz" in child.stderr
    assert "sha256" in child.stderr
