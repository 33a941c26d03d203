"""``config.json`` of an export says of head and embedding what the weights are: transformers drops a head that it calls tied."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
import jlora.export

EMBED = jax.random.normal(jax.random.key(0), (13, 6))
IDS = jnp.arange(3)


def apart(p, ids):
    return jnp.tanh(p["embed"][ids]) @ p["head"]


def tied(p, ids):
    return jnp.tanh(p["embed"][ids]) @ p["embed"].T


def saved(folder, *, embed="model.embed_tokens.weight", head="lm_head.weight", change=True, **options):
    """``config.json`` of an export of a model with a head of its own, which differs from its embedding if ``change``."""
    params = {"embed": EMBED, "head": EMBED.T}
    sites = jlora.sites(apart, params, IDS)
    lora = jlora.init(jax.random.key(1), params, sites, jlora.LoRA(rank=2, targets=["embed", "head"]))
    lora = jax.tree.map(lambda x: x + 0.1, lora) if change else lora
    jlora.export.save(folder, params, lora, sites=sites, names={"embed": embed, "head": head}, **options)
    found = load_file(folder / "model.safetensors")
    assert np.array_equal(found[embed], found[head]) is not change
    return json.loads((folder / "config.json").read_text())


FAMILIES = {  # names in transformers; the classes of all but the first tie where config.json is silent
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "gpt_neox": ("gpt_neox.embed_in.weight", "embed_out.weight"),
    "mamba": ("backbone.embeddings.weight", "lm_head.weight"),
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    "roberta": ("roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
    "electra": ("electra.embeddings.word_embeddings.weight", "generator_lm_head.weight"),
    "distilbert": ("distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),
    "modernbert": ("model.embeddings.tok_embeddings.weight", "decoder.weight"),
    "whisper": ("model.decoder.embed_tokens.weight", "proj_out.weight"),
    "openai-gpt": ("transformer.tokens_embed.weight", "lm_head.weight"),
    "llava": ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
}


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("said", [{}, {"tie_word_embeddings": True}])
def test_a_head_that_differs_is_not_called_tied(kind, said, tmp_path):
    embed, head = FAMILIES[kind]
    config = {"model_type": kind, "is_encoder_decoder": kind == "whisper"} | said
    before = dict(config)
    assert saved(tmp_path / "m", embed=embed, head=head, config=config) == config | {"tie_word_embeddings": False}
    assert config == before  # the caller's is left alone


@pytest.mark.parametrize("said", [{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}])
def test_a_head_that_is_the_embedding_stays_what_it_was_called(said, tmp_path):
    assert saved(tmp_path / "m", change=False, config={"model_type": "llama"} | said) == {"model_type": "llama"} | said


@pytest.mark.parametrize("inside", ["text_config", "decoder", "llm_config"])
@pytest.mark.parametrize("text", [{}, {"tie_word_embeddings": True}])
def test_the_configuration_of_the_text_model_says_it_too(inside, text, tmp_path):
    """transformers 4.57 asks that alone, others ask the whole one."""
    config = {
        "model_type": "llava",
        "tie_word_embeddings": False,
        inside: {"model_type": "gemma"} | text,
        "vision_config": {},
    }
    found = saved(tmp_path / "m", config=config)
    assert found == config | {inside: {"model_type": "gemma", "tie_word_embeddings": False}}


@pytest.mark.parametrize("config", [{"model_type": "t5"}, {"model_type": "bart", "tie_word_embeddings": True}])
def test_what_encoder_and_decoder_share_cannot_be_untied_by_a_flag(config, tmp_path):
    with pytest.raises(
        ValueError, match=r"'lm_head.weight' differs from 'shared.weight'.*\n.*scaling of T5.\n.*as one leaf"
    ):
        saved(tmp_path / "m", embed="shared.weight", config=config)
    assert list(tmp_path.iterdir()) == []
    config |= {"tie_word_embeddings": False}  # one of the ways that the message names
    assert saved(tmp_path / "m", embed="shared.weight", config=config) == config


def one(folder, config, names="model.embed_tokens.weight"):
    params = {"embed": EMBED}
    jlora.export.save(folder, params, sites=jlora.sites(tied, params, IDS), names={"embed": names}, config=config)
    assert list(load_file(folder / "model.safetensors")) == ["model.embed_tokens.weight"]
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("names", ["model.embed_tokens.weight", ("model.embed_tokens.weight", "lm_head.weight")])
def test_one_leaf_for_both_is_called_tied(names, tmp_path):
    """Files hold it once, so that a class that does not tie by default would make a head of nothing."""
    flag = {"tie_word_embeddings": True}
    assert one(tmp_path / "a", {"model_type": "llama"}, names) == {"model_type": "llama"} | flag
    assert one(tmp_path / "b", flag, names) == flag
    assert one(tmp_path / "c", {"hidden": 3}, names) == {"hidden": 3}  # of no model of transformers
    with pytest.raises(
        ValueError, match=r"'model.embed_tokens.weight' is embedding and head in one.*\n  Put .*True into config"
    ):
        one(tmp_path / "d", {"model_type": "llama", "tie_word_embeddings": False}, names)
    assert not (tmp_path / "d").exists()


def test_a_configuration_that_stays_is_mended_too(tmp_path):
    saved(tmp_path / "m", change=False, config={"model_type": "llama", "tie_word_embeddings": True, "hidden": 3})
    wanted = {"model_type": "llama", "tie_word_embeddings": False, "hidden": 3}
    assert saved(tmp_path / "m", overwrite=True) == wanted
    assert saved(tmp_path / "m", overwrite=True, shard_bytes=10**9) == wanted


def test_a_configuration_is_a_mapping_or_has_one(tmp_path):
    class Config:
        def to_dict(self):
            return {"model_type": "llama", "tie_word_embeddings": True}

    assert saved(tmp_path / "m", config=Config()) == {"model_type": "llama", "tie_word_embeddings": False}
    with pytest.raises(TypeError, match=r"config must be a mapping.*to_dict\(\).*\n  got: list"):
        saved(tmp_path / "x", config=[1])
    for wrong in ({"dtype": jnp.float32}, {"x": float("nan")}):
        with pytest.raises(TypeError, match="config must hold what JSON has"):
            saved(tmp_path / "x", config=wrong)
    assert not (tmp_path / "x").exists()
