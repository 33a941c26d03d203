"""What every command leaves behind when it fails or is stopped, and what it shows."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from cli_case import MIX, PEFT, ROOT, base_of, call, commands, trained
from safetensors.numpy import load_file, save_file

import jlora
from jlora import _cli_show, _folders, cli


def test_nothing_is_written_into_what_is_read(here, own):
    for i, args in enumerate(commands(here, own)):
        read = args[1] if args[0] != "combine" else args[2]
        message = call(*(here / read / "inside" if x == "OUT" else x for x in args), code=2)
        assert "inside lies inside" in message, i
        assert not (here / read / "inside").exists()


def test_a_file_is_no_folder_to_write_into(here, own):
    (here / "file").write_text("")
    for out in ("file/a", "file/deep/a"):
        message = call("resize", "one", out, "--rank", 1, code=2)
        assert f"{here / 'file'} is a file, not a folder.\n  Choose another name." in message


def test_nothing_is_replaced_by_accident(here, own):
    before = None
    for i, args in enumerate(commands(here, own)):

        def run(out, *more, code=0, args=args):
            return call(*(out if x == "OUT" else x for x in args), *more, code=code)

        out = f"out{i}"
        run(out)
        before = {p: p.read_bytes() for p in (here / out).rglob("*") if p.is_file()}
        message = run(out, code=2)
        assert "There is already a" in message and "--force" in message  # noqa: PT018
        assert before == {p: p.read_bytes() for p in (here / out).rglob("*") if p.is_file()}
        run(out, "--force")
        (here / "mine").mkdir(exist_ok=True)
        (here / "mine" / "thesis.txt").write_text("x")
        assert "it is left alone" in run("mine", "--force", code=2)
        assert "would be replaced while it is read" in run(
            args[1] if args[0] != "combine" else args[2], "--force", code=2
        )
        (here / "empty").mkdir()
        run("empty")
        shutil.rmtree(here / "empty")
    assert before
    assert not [p.name for p in here.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (OSError(28, "No space left on device"), 3)])
def test_a_failure_leaves_nothing(error, code, here, own, monkeypatch):
    listed = commands(here, own)
    before = sorted(p.name for p in here.iterdir())

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(_folders, "_put", fail)
    for args in listed:
        message = call(*args, code=code)
        assert (
            message
            == f"jlora: {'interrupted: nothing is left half-written' if code == 130 else 'error: No space left on device'}\n"
        )
        assert before == sorted(p.name for p in here.iterdir()), args


def test_what_libraries_say_of_a_failure_is_not_printed_above_it(monkeypatch, capsys):
    """A full disk is told by orbax, which logs its traceback, and by threads of its storage that find the command ended."""
    monkeypatch.setattr(sys, "argv", ["jlora"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    error = ValueError("the disk is full")
    with warnings.catch_warnings():
        cli._quiet()
    try:
        assert not logging.getLogger("absl").isEnabledFor(logging.ERROR)
        thread = threading.Thread(target=sys.excepthook, args=(ValueError, error, None))
        thread.start()
        thread.join()
        assert capsys.readouterr().err == ""
        sys.excepthook(ValueError, error, None)
        assert capsys.readouterr().err == "ValueError: the disk is full\n"
    finally:
        logging.disable(logging.NOTSET)


def test_merge_into_a_base_that_the_adapter_was_not_made_for(here):
    """The embedding that PEFT writes beside factors for it must be the base's; a tied head must not come apart unseen."""
    base = base_of("llama_embedding", here)
    call("merge", base, PEFT / "llama_embedding", "right")
    tensors = load_file(base / "model.safetensors")
    tensors["model.embed_tokens.weight"][9:] += 2
    save_file(tensors, base / "model.safetensors")
    assert "which is not 'model.embed_tokens.weight' of the base" in call(
        "merge", base, PEFT / "llama_embedding", "out", code=2
    )
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    save_file(load_file(PEFT / "llama_embedding" / "base.safetensors"), base / "model.safetensors")
    assert "which differ, though" in call("merge", base, PEFT / "llama_embedding", "out", code=2)
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "text_config": {"tie_word_embeddings": True}}))
    message = call("merge", base, PEFT / "llama_embedding", "out", code=2)
    assert 'If they are two, put "tie_word_embeddings": false' in message
    weights = load_file(base / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    shutil.copytree(PEFT / "llama_embedding", here / "a")
    file = here / "a" / "adapter_model.safetensors"
    save_file({key: x for key, x in load_file(file).items() if "lm_head" not in key}, file)
    assert "may be the output head as well" in call("merge", base, "a", "out", code=2)
    assert not (here / "out").exists()


SCRIPT = """
import os, signal, sys, time
from jlora import _cli_merge, cli
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs start without it
number = getattr(signal, sys.argv.pop())
_cli_merge.Fold.added = lambda *_: (os.kill(os.getpid(), number), time.sleep(60))
cli.main()
"""


def test_an_interrupt_before_a_command_has_begun():
    script = "import jlora._cli_app as a, jlora.cli\ndef app(**_):\n    raise KeyboardInterrupt\na.app = app\njlora.cli.main()"
    done = process("-c", script)
    assert (done.returncode, done.stderr) == (130, "interrupted: nothing is left half-written\n")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGINT"])
def test_a_signal_leaves_nothing_at_the_final_name(name, here):
    base = base_of("llama", here)
    done = process("-c", SCRIPT, "merge", base, PEFT / "llama", "out", name)
    number = getattr(signal, name)
    assert done.returncode == (-number if name == "SIGKILL" else 128 + number)
    assert "Traceback" not in done.stderr
    assert not (here / "out").exists()
    assert name == "SIGKILL" or [p.name for p in here.iterdir()] == ["llama-base"]


def process(*args, **env):
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    environment = (
        {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")} | {"PYTHONPATH": path} | env
    )
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)


def test_as_a_process(here):
    done = process("-m", "jlora.cli", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"jlora {jlora.__version__}\n", "")
    done = process("-m", "jlora.cli", "info", PEFT / "llama", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(json.loads(done.stdout)["sites"]) == 14
    done = process("-m", "jlora.cli", "info", "nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"jlora: error: There is no adapter at {here / 'nothing'}: nothing is there.\n"
    done = process("-m", "jlora.cli", "info", "nothing", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_on_the_cpu_unless_told_otherwise():
    code = "import sys; sys.argv = ['jlora', '--version']\nfrom jlora import cli\ntry: cli.main()\nexcept SystemExit: pass\n"
    code += "import jax; print(jax.config.jax_platforms)"
    assert process("-c", code).stdout.splitlines()[-1] == "cpu"
    assert process("-c", code, JAX_PLATFORMS="rocm").stdout.splitlines()[-1] == "rocm"


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == 'typer and rich missing.\n  pip install "jlora[cli]"\n'


def test_help_has_examples():
    for name in ("info", "merge", "convert", "extract", "resize", "combine", "diff"):
        assert f"jlora {name} " in call(name, "--help")
        assert name in call("--help")


def test_tables_are_whole_where_nobody_looks(here, own, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert MIX in call("info", "one")
    path = "p" * 300 + "/kernel"
    lora = trained(0)
    sites = jlora.sites(
        lambda p, x: x @ p["p" * 300]["kernel"], {"p" * 300: {"kernel": jnp.ones((3, 5))}}, jnp.ones((2, 3))
    )
    lora = jlora.init(
        jax.random.key(0), {"p" * 300: {"kernel": jnp.ones((3, 5))}}, sites, jlora.LoRA(rank=2, targets=path)
    )
    jlora.save(here / "long", lora)
    assert path in call("info", "long")


@pytest.mark.parametrize("width", [30, 200])
def test_tables_for_a_terminal(width, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", str(width))
    path = "a/[red]very/" + "long/" * 10 + "kernel"
    _cli_show.Screen(False).table(("weight", "norm"), [(path, "3")], right=(1,))
    with _cli_show.progress("work", 2) as step:
        step("[a]")
    out = capsys.readouterr().out
    assert path in re.sub(r"\x1b\[\d*m|\n", "", out)
    assert ("norm 3" in out) == (width == 30)


def test_numbers_are_spelled():
    spelled = [_cli_show.percent(x) for x in (None, 0, 1e-6, 0.25, 0.99999, 1)]
    assert spelled == [
        "-",
        "0.00 %",
        "<0.01 %",
        "25.00 %",
        ">99.99 %",
        "100.00 %",
    ]
    assert _cli_show.number(None) == "-"
    assert _cli_show._plain({"a": [float("inf"), 1.5, True, Path("x")]}) == {"a": [None, 1.5, True, "x"]}
