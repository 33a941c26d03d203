"""Names with what a terminal obeys: escaped wherever they are shown, kept as they are where they are data."""

import json
import re
import shlex
import shutil
import struct
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_case import call
from test_checkpoint import assert_same
from typer.testing import CliRunner

import jlora
import jlora.export
import jlora.peft
from jlora import _cli_app, _cli_show, _files, _text

EVIL = "u\x1b]52;c;ZXZpbA==\x07\x1b[2J\x7f\x9b1m\u202e\u2066\u200b\u2028\u2029\r\n[red]p"
HALF = "u\ud800p"
FIRST, SECOND = "\x1b[31mfirst", "\x9b2Jsecond\u202e"


def clean(text):
    """Raises if a terminal would obey any of ``text``."""
    odd = sorted({c for c in text if not c.isprintable() and c != "\n"})
    assert not odd, (odd, text)
    text.encode()
    return text


def model(params, x):
    return jnp.tanh(x @ params[EVIL]["kernel"]) @ params["down"]["kernel"]


PARAMS = {EVIL: {"kernel": jnp.ones((3, 5))}, "down": {"kernel": jnp.ones((5, 7))}}
X = jnp.ones((2, 3))
SITES = jlora.sites(model, PARAMS, X)
RULE = jlora.LoRA(rank=2, targets=lambda site: True)


def adapter(rule=RULE):
    return jax.tree.map(lambda x: x + 0.5, jlora.init(jax.random.key(0), PARAMS, SITES, rule))


@pytest.mark.parametrize(
    "c", ["\0", "\a", "\b", "\t", "\n", "\r", "\x1b", "\x7f", "\x80", "\x85", "\x9b", "\xad", "\u200b", "\u200e"]
)
def test_controls_are_shown_as_escapes(c):
    assert clean(_text.shown(f"a{c}b")) == "a" + c.encode("unicode_escape").decode() + "b"


@pytest.mark.parametrize(
    "c",
    ["\u061c", "\u2028", "\u2029", "\u202a", "\u202e", "\u2060", "\u2066", "\u2069", "\ufeff", "\ud800", "\U000e0001"],
)
def test_what_is_hidden_is_shown_as_escapes(c):
    assert clean(_text.shown(f"a{c}b")) == "a" + c.encode("unicode_escape").decode() + "b"
    assert clean(_text.printable(f"a\nb{c}")) == "a\nb" + c.encode("unicode_escape").decode()


def test_what_is_printable_stays():
    assert _text.shown("größe/重み[red]\\d") == "größe/重み[red]\\d"
    assert _text.shown("x" * 300) == "x" * 200 + "…"


def test_names_are_data(tmp_path):
    lora = adapter()
    assert set(lora) == {f"{EVIL}/kernel", "down/kernel"}
    jlora.save(tmp_path / "a", lora, note=EVIL)
    assert_same(jlora.load(tmp_path / "a", PARAMS), lora)
    assert jlora.metadata(tmp_path / "a")["meta"] == {"note": EVIL}
    jlora.peft.save(tmp_path / "p", lora)
    again = jlora.peft.load(tmp_path / "p", SITES)
    assert all(np.allclose(again[path].delta(None), lora[path].delta(None)) for path in {*again, *lora})
    jlora.export.save(tmp_path / "e", PARAMS, lora, sites=SITES)
    merged = jlora.export.load(tmp_path / "e", PARAMS, sites=SITES)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), merged, jlora.merge(PARAMS, lora))


def test_tables_of_the_library():
    for text in (str(SITES), jlora.summary(PARAMS, adapter())):
        assert "u\\x1b]52;c;ZXZpbA==\\x07" in clean(text)


OTHER = {"w": {"kernel": jnp.ones((3, 5))}, FIRST: {"kernel": jnp.ones((5, 7))}}
OTHERS = jlora.sites(lambda p, x: x @ p["w"]["kernel"] @ p[FIRST]["kernel"], OTHER, X)
ERRORS = {
    "init": lambda lora, t: jlora.init(jax.random.key(0), OTHER, SITES, RULE),
    "targets": lambda lora, t: jlora.init(jax.random.key(0), PARAMS, SITES, jlora.LoRA(rank=2, targets="u.*x")),
    "rank": lambda lora, t: jlora.init(
        jax.random.key(0), PARAMS, SITES, jlora.LoRA(rank=50, targets=lambda s: "u" in s.path[:2])
    ),
    "site": lambda lora, t: SITES["u"],
    "skipped": lambda lora, t: jlora.sites(lambda p, x: x, PARAMS, X)[f"{EVIL}/kernel"],
    "apply": lambda lora, t: jlora.wrap(model)(OTHER, lora, X),
    "leaf": lambda lora, t: jlora.wrap(model)(PARAMS, {EVIL: lora["down/kernel"]}, X),
    "dense": lambda lora, t: jlora.wrap(lambda p, x: jnp.sort(p[EVIL]["kernel"]).sum())(PARAMS, lora, X),
    "merge": lambda lora, t: jlora.merge({EVIL: {"kernel": jnp.ones((3, 5))}}, lora),
    "integers": lambda lora, t: jlora.sites(lambda p, x: x, {EVIL: "text"}, X),
    "twice": lambda lora, t: jlora.sites(lambda p, x: x, {"a/" + EVIL: X, "a": {EVIL: X}}, X),
    "summary": lambda lora, t: jlora.summary(OTHER, lora),
    "shardings": lambda lora, t: jlora.shardings(OTHER, lora),
    "not finite": lambda lora, t: jlora.save(
        t / "x", jax.tree.map(lambda x: x * jnp.nan, {f"{EVIL}/kernel": lora[f"{EVIL}/kernel"]})
    ),
    "load": lambda lora, t: jlora.load(t / "a", OTHER),
    "peft.load": lambda lora, t: jlora.peft.load(t / "p", OTHERS),
    "peft.names": lambda lora, t: jlora.peft.save(t / "q", lora, names={f"{EVIL}/kernal": "x"}),
    "peft.same": lambda lora, t: jlora.peft.save(t / "q", lora, names={".*": EVIL + ".weight"}),
    "peft.base": lambda lora, t: jlora.peft.save(t / "q", lora, params=OTHER),
    "export.load": lambda lora, t: jlora.export.load(t / "e", OTHER, sites=OTHERS),
    "export.ignore": lambda lora, t: jlora.export.load(t / "e", PARAMS, sites=SITES, ignore=EVIL),
    "export.names": lambda lora, t: jlora.export.save(t / "f", PARAMS, lora, sites=SITES, names={f"{EVIL}/kernel": ()}),
    "export.sites": lambda lora, t: jlora.export.save(t / "f", PARAMS, lora, sites=OTHERS),
    "export.orbax": lambda lora, t: jlora.export.save_orbax(t / "f", {EVIL: jnp.ones((0, 3))}),
    "export.arrays": lambda lora, t: jlora.export.arrays(lora, rank=1),
    "export.function": lambda lora, t: jlora.export.function(
        model, {**PARAMS, EVIL: {"kernel": PARAMS[EVIL]["kernel"], 3: X}}, lora, X
    ),
    "resize": lambda lora, t: jlora.algebra.resize(lora, rank={f"{EVIL}x": 1}),
    "rank of": lambda lora, t: jlora.algebra.resize(lora, rank=9),
    "combine": lambda lora, t: jlora.algebra.combine([lora, jlora.init(jax.random.key(0), OTHER, OTHERS, RULE)]),
    "extract": lambda lora, t: jlora.algebra.extract(PARAMS, {"down": PARAMS["down"], FIRST: X}, SITES, rank=1),
}


@pytest.mark.parametrize("call_it", ERRORS.values(), ids=ERRORS)
def test_messages_of_errors(call_it, tmp_path):
    lora = adapter()
    jlora.save(tmp_path / "a", lora)
    jlora.peft.save(tmp_path / "p", lora)
    jlora.export.save(tmp_path / "e", PARAMS, lora, sites=SITES)
    with pytest.raises((ValueError, KeyError, TypeError)) as caught:
        call_it(lora, tmp_path)
    said = str(caught.value) if not isinstance(caught.value, KeyError) else caught.value.args[0]
    lines = clean(said).split("\n")
    assert not any(line.startswith("[red]") for line in lines)  # a name does not begin a line of its own


def renamed(folder, old, new):
    """Another name for a module of a PEFT adapter, in its tensors and its configuration."""
    file = folder / "adapter_model.safetensors"
    raw = file.read_bytes()
    n = struct.unpack("<Q", raw[:8])[0]
    header = json.dumps({k.replace(old, new): v for k, v in json.loads(raw[8 : 8 + n]).items()}).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + n :])
    config = json.loads((folder / "adapter_config.json").read_text())
    text = json.dumps({k: v for k, v in config.items() if k != "target_modules"}).replace(
        json.dumps(old)[1:-1], json.dumps(new)[1:-1]
    )
    modules = [new if m == old else m for m in config["target_modules"]]
    (folder / "adapter_config.json").write_text(json.dumps(json.loads(text) | {"target_modules": modules}))


def folders(here, monkeypatch):
    """An adapter of each format, one of another base, and models: all with names that a terminal obeys."""
    monkeypatch.chdir(here)
    lora = adapter()
    jlora.save("own", lora, **{FIRST: SECOND})
    jlora.save("other", jlora.init(jax.random.key(0), OTHER, OTHERS, RULE))
    jlora.peft.save("p", lora)
    jlora.peft.save("q", jlora.init(jax.random.key(0), OTHER, OTHERS, RULE))
    jlora.peft.save("about", lora, base_model=EVIL, task_type=SECOND)
    jlora.export.save("model", PARAMS, sites=SITES, config={"model_type": EVIL})
    jlora.export.save("tuned", PARAMS, lora, sites=SITES, config={"model_type": EVIL})
    jlora.export.save("strange", OTHER, sites=OTHERS)
    jlora.export.save("shards", PARAMS, sites=SITES, shard_bytes=40)
    index = json.loads((here / "shards" / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], f"{SECOND}.safetensors")
    (here / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    jlora.export.save_orbax("params", PARAMS)
    jlora.export.save_orbax("after", PARAMS, lora)
    jlora.export.save_orbax("else", OTHER)
    (here / "names.json").write_text(json.dumps({f"{EVIL}/kernel": EVIL + ".weight", "down/kernel": "down.weight"}))
    (here / "bad.json").write_text(json.dumps({FIRST: {SECOND: 1}}))


COMMANDS = """
info own | info other | info p | info about | info q | info model | info params | info p --base strange | info own --base else
diff own own | diff p p | diff own other | diff p q | diff p own | diff p about --base strange
merge model p out --conv1d '' | merge params own out | merge strange p out --conv1d '' | merge params other out | merge else own out
merge shards p out | merge model p out | merge model p out --conv1d '' --prefix u=x | merge model p out --tied x=y --conv1d ''
convert own out --to peft --names names.json | convert own out --to peft --names bad.json | convert own out --to peft
convert p out --to orbax --names names.json --like own | convert p out --to orbax --names names.json --like other
convert p out --to orbax --names names.json --base params | convert p out --to orbax | convert p out --to orbax --base else
resize own out --rank 1 | resize p out --rank 1 | resize own out --rank 9 | resize about out --rank 1
combine out own own | combine out p p | combine out own other | combine out p q | combine out p own
extract model tuned out --rank 2 --conv1d '' | extract model strange out --rank 2 | extract model tuned out --rank 2
extract params after out --rank 2 --like own | extract params else out --rank 2 --like own | extract params after out --rank 2 --like other
extract model tuned out --rank 2 --conv1d x | extract model tuned out --rank 2 --conv1d '' --embedding '.*down.*'
"""


@pytest.mark.parametrize("more", [[], ["--json"], ["--debug"]], ids=["plain", "json", "debug"])
def test_commands(more, tmp_path, monkeypatch):
    folders(tmp_path, monkeypatch)
    codes, escaped = [], 0
    for line in COMMANDS.replace("\n", "|").split("|"):
        if not line.strip():
            continue
        found = CliRunner().invoke(_cli_app.app, [*shlex.split(line), *more])
        assert "was not expected" not in found.stderr, line
        assert found.exit_code in (0, 1, 2), (line, found.stderr)
        clean(found.stdout)
        clean(found.stderr)
        assert not any(text.startswith("[red]") for text in (found.stdout + found.stderr).split("\n"))
        codes.append(found.exit_code)
        escaped += "\\x1b" in found.output or "\\u001b" in found.output
        shutil.rmtree("out", ignore_errors=True)
    assert codes.count(0) > 15, codes
    assert codes.count(2) > 15, codes
    assert escaped > 20


def test_tables_on_a_terminal(monkeypatch, capsys):
    for columns in ("200", "20"):
        monkeypatch.setenv("COLUMNS", columns)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        _cli_show.Screen(False).table(("path [b]", "rank"), [(EVIL, "2"), ("[link=http://x]y[/link]", "3")], right=(1,))
        said = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)  # rich's own colours
        assert "[red]p" in clean(said).replace("\n", "")
        assert "[link=http://x]y[/link]" in said.replace("\n", "")


def test_a_surrogate_in_a_tree(tmp_path):
    params = {HALF: {"kernel": jnp.ones((3, 5))}}
    sites = jlora.sites(lambda p, x: x @ p[HALF]["kernel"], params, X)
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets=".*"))
    assert r"u\ud800p/kernel" in clean(str(sites))
    assert jlora.wrap(lambda p, x: x @ p[HALF]["kernel"])(params, lora, X).shape == (2, 5)
    jlora.save(tmp_path / "a", lora, note=HALF)
    assert_same(jlora.load(tmp_path / "a", params), lora)
    clean(call("info", tmp_path / "a"))
    message = r"u\\ud800p.*' cannot be written as a name: \\ud800 is half of a character, .*\n  Rename it"
    for save in (
        lambda: jlora.peft.save(tmp_path / "x", lora),
        lambda: jlora.export.save(tmp_path / "x", params, lora, sites=sites),
        lambda: jlora.export.save_orbax(tmp_path / "x", params, lora),
        lambda: jlora.export.function(lambda p, x: x @ p[HALF]["kernel"], params, lora, X),
        lambda: _files.write_safetensors(tmp_path / "x", {HALF: np.ones(3)}),
    ):
        with pytest.raises(ValueError, match=message):
            save()
        assert not (tmp_path / "x").exists()


def test_a_surrogate_in_files(tmp_path):
    folder = tmp_path / "p"
    jlora.peft.save(folder, adapter())
    renamed(folder, EVIL, HALF)
    (folder / "checksums.json").unlink()
    for load in (lambda: jlora.peft.load(folder, SITES), lambda: jlora.peft.read(folder)):
        with pytest.raises(ValueError, match=r"u\\ud800p.*half of a character"):
            load()
    jlora.peft.save(folder, adapter(), overwrite=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "checksums.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps(config | {HALF: HALF, "peft_type": HALF}))
    with pytest.raises(ValueError, match=r"u\\ud800p"):
        jlora.peft.load(folder, SITES)
