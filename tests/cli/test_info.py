"""``jlora info``: what is told of an adapter in either format."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from cli_case import DOWN, MIX, PEFT, SITES, UP, call, called, checkpoint, trained
from peft_models import PORTS

import jlora
import jlora.peft


def test_rates_of_dropout_that_differ(here):
    jlora.save("two", trained(3, [jlora.LoRA(rank=2, dropout=0.25, targets=UP), jlora.LoRA(rank=2, targets=DOWN)]))
    message = call("convert", "two", "peft", "--to", "peft", code=2)
    assert f"have several: 0.0 at '{DOWN}', 0.25 at '{UP}'" in message
    assert "--dropout RATE" in message
    call("convert", "two", "peft", "--to", "peft", "--dropout", 0.5)
    assert json.loads(Path("peft/adapter_config.json").read_text())["lora_dropout"] == 0.5
    call("combine", "sum", "two", "two", "--dropout", 0.125)
    assert {x.dropout for x in jlora.load("sum").values()} == {0.125}
    assert "--dropout takes a rate" in call("combine", "again", "two", "two", "--dropout", 1, code=2)


def test_info_of_an_own_adapter(own):
    found = called("info", "one")
    sites = {site["path"]: site for site in found["sites"]}
    assert set(sites) == {UP, MIX, DOWN}
    assert set(sites[UP]) == {
        "path", "kind", "use", "only", "shape", "rank", "scale", "parameters", "norm", "effective_rank",
    }  # fmt: skip
    assert sites[UP]["shape"] == [3, 5]
    assert (sites[UP]["rank"], sites[UP]["scale"], sites[UP]["parameters"]) == (2, 2, 16)
    assert sites[MIX]["norm"] == pytest.approx(float(jnp.linalg.norm(trained(0)[MIX].delta())), rel=1e-5)
    assert len(sites[MIX]["effective_rank"]) == 4
    assert found["format"] == "orbax"
    assert found["base"] == {"name": "me/tiny", "fingerprint": SITES.base.digest, "leaves": 4}
    assert found["about"]["task"] == "demo 0"
    assert found["parameters"] == sum(x.size for x in jax.tree.leaves(trained(0)))
    text = call("info", "one")
    assert "task: demo 0" in text
    assert re.search(rf"^{MIX}  +linear  +4×5×5  +2  +2  +80 ", text, re.M)


def test_info_of_one_use_of_a_table(here):
    params = {"embed": jnp.ones((11, 3))}
    sites = jlora.sites(lambda p, i: p["embed"][i] @ p["embed"].T, params, jnp.arange(4))
    rule = jlora.LoRA(rank=2, targets="embed", only="lookup")
    jlora.save(here / "tied", jlora.init(jax.random.key(0), params, sites, rule))
    (site,) = called("info", "tied")["sites"]
    assert (site["use"], site["only"]) == ("linear+lookup", "lookup")
    assert re.search(r"^embed  +linear\+lookup \(lookup only\)  +11×3 ", call("info", "tied"), re.M)
    checkpoint(here / "base", params)
    assert "'embed' cannot be merged" in call("merge", "base", "tied", "out", code=2)
    assert not (here / "out").exists()


@pytest.mark.parametrize("kind", sorted({*PORTS} - {"experts", "llama_tokens", "nested"}))
def test_info_of_peft(kind):
    found = called("info", PEFT / kind)
    lora, _ = jlora.peft.read(PEFT / kind)
    assert [site["path"] for site in found["sites"]] == list(lora)
    assert found["format"] == "peft"
    assert found["version"] == "PEFT 0.21.2"
    assert len(call("info", PEFT / kind).splitlines()) == len(lora) + 4


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("dora", "DoRA's magnitudes"),
        ("pissa", "changes the base before training"),
        ("experts", "the file does not name them"),
    ],
)
def test_info_says_what_it_cannot_read(kind, message):
    assert message in call("info", PEFT / kind, code=2)
