"""``jlora extract``: adapters out of two models."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cli_case import CONV1D, MIX, PARAMS, PEFT, UP, base_of, call, called, checkpoint, low_rank, tuned
from safetensors.numpy import load_file, save_file

import jlora
from jlora._text import counted


def test_extracting_and_merging_gives_the_tuned_model(here):
    base = base_of("llama", here)

    def change(found):
        for name in found:
            if "proj" in name:
                found[name] += low_rank(found[name].shape)

    after = tuned(base, change)
    found = called("extract", base, after, "a", "--rank", 4, "--energy", 0.9999, "--base-model", "me/llama")
    assert set(found) == {"out", "format", "energy", "sites", "whole", "ignored", "reasons", "unchanged"}
    assert {x["rank"] for x in found["sites"]} == {3}
    assert found["energy"] > 0.9999
    assert found["unchanged"] == 7
    assert called("info", "a")["base"]["name"] == "me/llama"
    call("merge", base, "a", "out")
    got, want = (load_file(x / "model.safetensors") for x in (here / "out", after))
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)
    assert called("extract", base, after, "b", "--rank", 1)["energy"] < 0.9


def test_extracting_from_conv1d(here):
    base = base_of("gpt2", here)
    name = "transformer.h.0.attn.c_proj.weight"
    after = tuned(base, lambda found: found.update({name: found[name] + low_rank((12, 12))}))
    assert "may be (out, in)" in call("extract", base, after, "a", "--rank", 3, code=2)
    call("extract", base, after, "a", "--rank", 3, *CONV1D)
    call("merge", base, "a", "out", *CONV1D)
    np.testing.assert_allclose(
        load_file(here / "out" / "model.safetensors")[name], load_file(after / "model.safetensors")[name], atol=1e-5
    )


def test_what_changed_beside_matrices(here):
    base = base_of("bert", here)

    def change(found):
        found["bert.pooler.dense.weight"] += low_rank((12, 12))
        found["bert.pooler.dense.bias"] += 1
        found["bert.encoder.layer.0.output.LayerNorm.weight"] += 1

    after = tuned(base, change)
    message = call("extract", base, after, "a", "--rank", 3, code=2)
    assert "2 tensors changed for which there are no factors" in message
    assert "bert.pooler.dense.bias: (12,) is no matrix" in message
    found = called("extract", base, after, "a", "--rank", 3, "--rest", "ignore")
    assert len(found["ignored"]) == 2
    assert "ignored: bert.pooler.dense.bias" in call(
        "extract", base, after, "a", "--rank", 3, "--rest", "ignore", "--force"
    )
    found = called("extract", base, after, "b", "--rank", 3, "--rest", "full")
    assert set(found["whole"]) == {
        "bert.pooler.dense.bias",
        "bert.encoder.layer.0.output.LayerNorm.weight",
        "bert.encoder.layer.0.output.LayerNorm.bias",  # PEFT saves modules whole
    }
    call("merge", base, "b", "out")
    got, want = (load_file(x / "model.safetensors") for x in (here / "out", after))
    for name in want:
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)


UP_PROJ = "model.layers.0.mlp.up_proj.weight"


def test_extracting_an_embedding(here):
    base = base_of("llama", here)
    name = "model.embed_tokens.weight"
    after = tuned(base, lambda found: found.update({name: found[name] + low_rank((23, 24))}))
    assert "may be embeddings" in call("extract", base, after, "a", "--rank", 3, code=2)
    call("extract", base, after, "a", "--rank", 3, "--embedding", name)
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in load_file(here / "a" / "adapter_model.safetensors")
    (base / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": true}')
    assert "it is tied to the output head" in call(
        "extract", base, after, "b", "--rank", 3, "--embedding", name, code=2
    )
    message = call("extract", base, after, "b", "--rank", 3, "--embedding", "embed_tokens", code=2)
    assert "--embedding 'embed_tokens' matches no weight of the model" in message


def two_models(here, *, config=None, bias=False, **shapes):
    """A base and what was trained of it, of these weights, each with a bias or not."""
    for name, shift in (("base", 0.0), ("after", 0.1)):
        (here / name).mkdir()
        found = {f"{k}.weight": np.ones(shape, np.float32) + shift * low_rank(shape) for k, shape in shapes.items()}
        found |= {f"{k}.bias": np.zeros(shape[0], np.float32) for k, shape in shapes.items() if bias}
        save_file(found, here / name / "model.safetensors")
        (here / name / "config.json").write_text(json.dumps({"model_type": "mine"} | (config or {})))
    return here / "base", here / "after"


def test_a_table_and_a_linear_layer_are_not_guessed(here):
    """They have the same tensors: names that linear layers have are taken, others have to be said."""
    base, after = two_models(here, tok=(20, 8), ids=(5, 7), head=(3, 8), q_proj=(5, 8))
    message = call("extract", base, after, "a", "--rank", 2, code=2)
    assert "may be embeddings" in message
    assert "'ids.weight' (5, 7), 'tok.weight' (20, 8)." in message
    assert "--embedding 'ids.weight'" in message
    call("extract", base, after, "a", "--rank", 2, "--embedding", "(tok|ids).weight")
    keys = {k.removeprefix("base_model.model.") for k in load_file(here / "a" / "adapter_model.safetensors")}
    assert {"tok.lora_embedding_A", "ids.lora_embedding_B", "head.lora_A.weight", "q_proj.lora_B.weight"} <= keys
    call("extract", base, after, "b", "--rank", 2, "--embedding", "")
    assert "base_model.model.tok.lora_A.weight" in load_file(here / "b" / "adapter_model.safetensors")


def test_a_module_with_a_bias_is_no_table(here):
    base, after = two_models(here, bias=True, embedder=(20, 8), ids=(5, 7))
    assert {x["path"] for x in called("extract", base, after, "a", "--rank", 2)["sites"]} == {
        "embedder.weight", "ids.weight",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("more", "config", "reason"),
    [
        ({"head": (3, 8)}, {}, ""),
        ({"head": (3, 8)}, {"tie_word_embeddings": True}, "it is tied to the output head"),
        ({"q_proj": (5, 8)}, {"tie_word_embeddings": False}, ""),
        ({"q_proj": (5, 8)}, {}, 'if it is not, put "tie_word_embeddings": false there'),
    ],
)
def test_whether_a_table_is_tied_is_not_guessed(more, config, reason, here):
    base, after = two_models(here, config=config, tok=(20, 8), **more)
    arguments = ("extract", base, after, "a", "--rank", 2, "--embedding", "tok.weight")
    if reason:
        assert reason in call(*arguments, code=2)
    else:
        assert "tok.weight" in {x["path"] for x in called(*arguments)["sites"]}


def test_extracting_from_checkpoints(here, own):
    after = jax.tree.map(lambda x: x, PARAMS)
    after["params"]["up"] = {"kernel": PARAMS["params"]["up"]["kernel"] + low_rank((3, 5), 1), "bias": jnp.ones(5)}
    after["params"]["layers"] = {"mix": PARAMS["params"]["layers"]["mix"] + low_rank((5, 5), 2)}
    one, two = checkpoint(here / "p", PARAMS), checkpoint(here / "q", after)
    assert "only of a matrix named kernel, or with --like" in call("extract", one, two, "a", "--rank", 2, code=2)
    found = called("extract", one, two, "a", "--rank", 2, "--like", "one", "--rest", "full")
    assert {x["path"] for x in found["sites"]} == {UP, MIX}
    assert found["whole"] == ["params/up/bias"]
    merged = jlora.merge(PARAMS, jlora.load(here / "a", PARAMS))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), merged, after)
    assert "--like is for orbax" in call(
        "extract", base_of("llama", here), "llama-base", "x", "--rank", 2, "--like", "one", code=2
    )
    assert "Both models must be of one format" in call("extract", one, "llama-base", "x", "--rank", 2, code=2)


def test_extracting_is_refused(here):
    base = base_of("llama", here)
    assert "the adapter would have no effect" in call("extract", base, base, "a", "--rank", 2, code=2)
    after = tuned(base, lambda found: found.pop("model.norm.weight"))
    assert "only in the base: model.norm.weight" in call("extract", base, after, "a", "--rank", 2, code=2)
    for models in ((PEFT / "llama", base), (base, PEFT / "llama")):
        message = call("extract", *models, "a", "--rank", 2, code=2)
        assert (
            "llama is an adapter, not a model.\n  extract makes an adapter of two models: jlora extract BASE" in message
        )
    assert "--rank must be at least 1" in call("extract", base, after, "a", "--rank", 0, code=2)
    assert "--energy must be above 0" in call("extract", base, after, "a", "--rank", 1, "--energy", "nan", code=2)
    save_file({"model.norm.weight": np.ones(3, np.float32)}, after / "model.safetensors")
    assert sorted(x.name for x in here.iterdir()) == ["llama-base", "tuned"]


def test_extract_says_what_it_keeps_whole(here):
    after = jax.tree.map(lambda x: x, PARAMS)
    after["params"]["layers"] = {"mix": PARAMS["params"]["layers"]["mix"] + 1}
    after["params"]["up"] = {"kernel": PARAMS["params"]["up"]["kernel"] + low_rank((3, 5), 1), "bias": jnp.ones(5)}
    one, two = checkpoint(here / "p", PARAMS), checkpoint(here / "q", after)
    assert f"kept whole: {MIX}: its axes are not known" in call("extract", one, two, "a", "--rank", 2, "--rest", "full")
    found = called("extract", one, two, "a", "--rank", 2, "--rest", "full", "--force")
    assert found["reasons"]["params/up/bias"] == "(5,) is no matrix"
    lora = jlora.load(here / "a", PARAMS)
    assert (lora[MIX].use, lora["params/up/bias"].use) == ("", "dense")


def test_a_tied_table_that_is_kept_whole_is_the_head_too(here):
    """PEFT would change the lookups alone: the adapter has both, which ``merge`` keeps as one."""
    base = base_of("llama_tied", here, tie_word_embeddings=True)
    name = "model.embed_tokens.weight"
    after = tuned(
        base, lambda f: f.update({name: f[name] + low_rank((23, 24)), UP_PROJ: f[UP_PROJ] + low_rank(f[UP_PROJ].shape)})
    )
    options = ("--rank", 3, "--rest", "full", "--embedding", name)
    assert set(called("extract", base, after, "a", *options)["whole"]) == {name, "lm_head.weight"}
    assert called("merge", base, "a", "out")["untied"] is False
    got, want = (load_file(x / "model.safetensors") for x in (here / "out", after))
    assert set(got) == set(want)
    for key, x in want.items():
        np.testing.assert_allclose(got[key], x, atol=1e-5)
    for folder in (base, after):  # nothing tells the name of the head, or whether there is one
        (folder / "config.json").write_text('{"model_type": "mine", "tie_word_embeddings": true}')
    assert "that no adapter of the base can have" in call("extract", base, after, "b", *options, code=2)
    (base / "config.json").write_text('{"model_type": "llama"}')
    assert 'put "tie_word_embeddings": false there' in call("extract", base, after, "b", *options, code=2)


def resized(here, form):
    """A base, and what was trained of it with two more tokens."""

    def more(x):
        return np.concatenate([x, x[:2]])

    if form == "safetensors":
        base = base_of("llama", here)
        names, other = ["model.embed_tokens.weight", "lm_head.weight"], "model.layers.0.self_attn.q_proj.weight"
        after = tuned(base, lambda f: f.update({n: more(f[n]) for n in names} | {other: f[other] + low_rank((24, 24))}))
        return base, after, names, other
    after = jax.tree.map(lambda x: x, PARAMS)
    after["params"]["up"] = {"kernel": PARAMS["params"]["up"]["kernel"] + low_rank((3, 5), 1), "bias": jnp.ones(7)}
    return checkpoint(here / "p", PARAMS), checkpoint(here / "q", after), ["params/up/bias"], UP


@pytest.mark.parametrize("form", ["safetensors", "orbax"])
def test_a_vocabulary_that_was_resized_is_left_out_if_asked(form, here, own):
    base, after, names, other = resized(here, form)
    message = call("extract", base, after, "a", "--rank", 3, code=2)
    assert f"{counted(len(names), 'tensor')} changed for which there are no factors" in message
    assert "Leave them out with --rest ignore.\n  If the vocabulary was resized, resize the base's as well" in message
    message = call("extract", base, after, "a", "--rank", 3, "--rest", "full", code=2)
    assert f"{counted(len(names), 'tensor')} changed that no adapter of the base can have" in message
    found = called("extract", base, after, "a", "--rank", 3, "--rest", "ignore")
    assert sorted(found["ignored"]) == sorted(names)
    assert all("in the base and (" in found["reasons"][name] for name in names)
    assert [x["path"] for x in found["sites"]] == [other]
    call("merge", base, "a", "out")


def test_integers_that_differ_are_left_out_if_asked(here):
    base, after = two_models(here, q_proj=(5, 8))
    for folder, ids in ((base, [1, 2]), (after, [1, 3])):
        found = load_file(folder / "model.safetensors")
        save_file(found | {"ids": np.array(ids)}, folder / "model.safetensors")
    assert "ids: it holds I64, to which nothing can be added" in call("extract", base, after, "a", "--rank", 2, code=2)
    assert called("extract", base, after, "a", "--rank", 2, "--rest", "ignore")["ignored"] == ["ids"]
