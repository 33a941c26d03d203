"""Nothing gives a traceback: arguments and files at random."""

import random
import re
import shutil

from cli_case import PARAMS, PEFT, base_of, call, checkpoint, commands
from typer.testing import CliRunner

from jlora import _cli_app

WORDS = [
    *("info", "merge", "convert", "extract", "resize", "combine", "diff"),
    *(
        "one",
        "two",
        "p",
        "base",
        "params",
        "OUT",
        "nothing",
        "file",
        "broken",
        "",
        ".",
        "/",
        "/dev/null",
        "\0",
        "ü",
        "x" * 300,
    ),
    *(
        "--rank",
        "0",
        "2",
        "-1",
        "1e9",
        "nan",
        "--energy",
        "0.5",
        "--to",
        "peft",
        "orbax",
        "--weights",
        "1,2",
        ",",
        "--method",
        "svd",
    ),
    *(
        "ties",
        "--density",
        "--seed",
        "--json",
        "--force",
        "--conv1d",
        "(",
        "--names",
        "names.json",
        "--like",
        "--base",
        "--tol",
    ),
    *("--dtype", "float16", "int8", "--rest", "full", "--prefix", "a=b", "--tied", "--help", "--"),
]


def test_a_fuzz_of_arguments(here, own):
    commands(here, own)
    shutil.copytree(here / "llama-base", here / "base")
    (here / "file").write_text("x")
    shutil.copytree(here / "one", here / "broken")
    (here / "broken" / "adapter.json").write_text('{"format": 1, "adapters": []}')
    chance = random.Random(0)
    seen = set()
    for _ in range(400):
        args = [chance.choice(WORDS[:7]), *(chance.choice(WORDS) for _ in range(chance.randrange(7)))]
        result = CliRunner().invoke(_cli_app.app, args)
        assert result.exception is None or isinstance(result.exception, SystemExit), (args, result.exception)
        assert "Traceback" not in result.output, args
        assert "not expected" not in result.output, (args, result.output)
        assert result.exit_code in (0, 1, 2, 3), args
        seen.add(result.exit_code)
    assert seen >= {0, 2}


def test_damaged_files_are_refused(here, own):
    base, params = base_of("llama", here), checkpoint(here / "params", PARAMS)
    file = base / "model.safetensors"
    whole = file.read_bytes()
    for damage in (whole[:-5], whole[:4], b"\xff" * 100, whole[:8] + b"x" + whole[9:], b""):
        file.write_bytes(damage)
        message = call("merge", base, PEFT / "llama", "out", code=2)
        assert re.search("is no safetensors file|was cut or added to|is damaged", message), message
    file.unlink()
    for index in ("[]", "{}", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {"a": "gone.safetensors"}}'):
        (base / "model.safetensors.index.json").write_text(index)
        call("merge", base, PEFT / "llama", "out", code=2)
    (params / "_METADATA").write_text("{}")
    call("merge", params, "one", "out", code=2)
    shutil.rmtree(here / "params" / "d")
    call("merge", params, "one", "out", code=2)
    (here / "one" / "adapter.json").write_text("{")
    assert "is not JSON" in call("info", "one", code=2)
    assert not (here / "out").exists()
