"""``jlora merge`` over a base whose head is its embedding: PEFT changes one of the two, so that the merged model has both, and says so.

What is right comes from the files, dense in NumPy. ``tests/test_merge_real.py`` compares the same with PEFT and transformers.
"""

import json
import shutil

import numpy as np
import pytest
from cli_case import PEFT, base_of, call, called
from safetensors.numpy import load_file, save_file

EMBED, HEAD, UP = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
rng = np.random.default_rng(0)
BASE = {EMBED: rng.normal(size=(11, 6)), UP: rng.normal(size=(9, 6))}
WHOLE = {name: rng.normal(size=(11, 6)) for name in (EMBED, HEAD)}
A, B, ROWS = rng.normal(size=(2, 11)), rng.normal(size=(6, 2)), rng.normal(size=(2, 6))
UPDATE = 2 * (B @ A).T  # alpha 4, rank 2; of the embedding (rank, rows), (columns, rank), of the head the transposes


def f4(tensors):
    return {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}


def base_at(here, kind="llama", rename=lambda name: name, head=False, **config):
    folder = here / "base"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    tensors = {rename(name): x for name, x in BASE.items()}
    tensors |= {HEAD: BASE[EMBED]} if head else {}
    save_file(f4(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": kind} | config))
    return folder


def adapter_at(here, *parts, rename=lambda name: name, **config):
    """An adapter of some of: whole values, factors, rows; and always of ``UP``."""
    m = "base_model.model."
    table, head, up = (m + rename(name).removesuffix(".weight") for name in (EMBED, HEAD, UP))
    tensors = {f"{up}.lora_A.weight": np.ones((2, 6)), f"{up}.lora_B.weight": np.ones((9, 2))}
    factors = {
        "table": {f"{table}.lora_embedding_A": A, f"{table}.lora_embedding_B": B},
        "head": {f"{head}.lora_A.weight": B.T, f"{head}.lora_B.weight": A.T},
        "other head": {f"{head}.lora_A.weight": B.T, f"{head}.lora_B.weight": -A.T},
        "whole table": {f"{table}.weight": WHOLE[EMBED]},
        "whole head": {f"{head}.weight": WHOLE[HEAD]},
        "rows": {f"{table}.token_adapter.trainable_tokens_delta": ROWS},
    }
    for part in parts:
        tensors |= factors[part]
    whole = [name for part, name in (("whole table", "embed_tokens"), ("whole head", "lm_head")) if part in parts]
    low = [
        name
        for part, name in (("table", "embed_tokens"), ("head", "lm_head"), ("other head", "lm_head"))
        if part in parts
    ]
    c = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "task_type": "CAUSAL_LM", "modules_to_save": whole or None}
    c |= {
        "trainable_token_indices": {"embed_tokens": [1, 5]} if "rows" in parts else None,
        "target_modules": ["up_proj", *low],
    }
    shutil.rmtree(here / "a", ignore_errors=True)
    (here / "a").mkdir()
    save_file(f4(tensors), here / "a" / "adapter_model.safetensors", metadata={"format": "pt"})
    (here / "a" / "adapter_config.json").write_text(json.dumps(c | config))
    return here / "a"


def merged(here, base, adapter, *options):
    """The report, the tensors and the configuration of a merged model."""
    report = called("merge", base, adapter, "out", "--force", *options)
    out = here / "out"
    return report, load_file(out / "model.safetensors"), json.loads((out / "config.json").read_text())


APART = {  # what is adapted, and what embedding and head are then
    ("whole table", "whole head"): (WHOLE[EMBED], WHOLE[HEAD]),
    ("whole head",): (BASE[EMBED], WHOLE[HEAD]),
    ("whole table",): (WHOLE[EMBED], BASE[EMBED]),
    ("table",): (BASE[EMBED] + UPDATE, BASE[EMBED]),
    ("head",): (BASE[EMBED], BASE[EMBED] + UPDATE),
    ("table", "other head"): (BASE[EMBED] + UPDATE, BASE[EMBED] - UPDATE),
    ("table", "whole head"): (BASE[EMBED] + UPDATE, WHOLE[HEAD]),
}
TIED = ("--tied", f"{HEAD}={EMBED}")


@pytest.mark.parametrize("parts", APART, ids=" and ".join)
@pytest.mark.parametrize("head", [False, True], ids=["once", "twice"])
def test_ends_that_are_adapted_apart_are_two(parts, head, here):
    base, adapter = base_at(here, head=head, tie_word_embeddings=True), adapter_at(here, *parts)
    before = (base / "config.json").read_bytes()
    for options in ((), TIED, ("--add-new",)):
        report, got, config = merged(here, base, adapter, *options)
        for name, want in zip((EMBED, HEAD), APART[parts], strict=True):
            np.testing.assert_allclose(got[name], want, atol=1e-5)
        assert config == {"model_type": "llama", "tie_word_embeddings": False}
        assert report["untied"] is True
        assert (HEAD in report["added"]) == (not head and "head" not in parts and "other head" not in parts)
    assert (base / "config.json").read_bytes() == before
    assert "config.json is false" in call("merge", base, adapter, "out", "--force")


@pytest.mark.parametrize("head", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize(
    ("parts", "config", "want"),
    [
        (("table", "head"), {}, BASE[EMBED] + UPDATE),
        (("table",), {"ensure_weight_tying": True}, BASE[EMBED] + UPDATE),
        (("whole table",), {"ensure_weight_tying": True}, WHOLE[EMBED]),
        (("rows",), {}, np.concatenate([BASE[EMBED][:1], ROWS[:1], BASE[EMBED][2:5], ROWS[1:], BASE[EMBED][6:]])),
    ],
)
def test_ends_that_change_together_stay_one(head, parts, config, want, here):
    base = base_at(here, head=head, tie_word_embeddings=True)
    for options in ((), TIED):
        report, got, written = merged(here, base, adapter_at(here, *parts, **config), *options)
        assert set(got) == {EMBED, UP} | ({HEAD} if head else set())
        for name in {EMBED, HEAD} & set(got):
            np.testing.assert_allclose(got[name], want, atol=1e-5)
        assert report["untied"] is False
        assert written["tie_word_embeddings"] is True


def test_a_model_without_ties_is_merged_as_it_is(here):
    adapter = adapter_at(here, "table")
    report, got, config = merged(here, base_at(here, tie_word_embeddings=False), adapter)
    assert (set(got), report["untied"], config["tie_word_embeddings"]) == ({EMBED, UP}, False, False)
    base = base_at(here, tie_word_embeddings=True)  # a classifier has no such head
    report, got, config = merged(here, base, adapter_at(here, "table", task_type="SEQ_CLS"))
    assert (set(got), report["untied"], config["tie_word_embeddings"]) == ({EMBED, UP}, False, True)


@pytest.mark.parametrize("parts", [*APART, ("rows",)], ids=" and ".join)
def test_where_nothing_tells_each_hint_works(parts, here):
    """A silent configuration, of a class that is not known to tie."""
    base, adapter = base_at(here), adapter_at(here, *parts)
    message = call("merge", base, adapter, "out", code=2)
    said = message.split("--tied ")[1].split()[0].replace("HEAD", HEAD)
    assert said == f"{HEAD}={EMBED}"
    report, got, config = merged(here, base, adapter, "--tied", said)
    assert report["untied"] is (parts != ("rows",))
    if parts == ("rows",):
        np.testing.assert_allclose(got[EMBED][[1, 5]], ROWS, atol=1e-6)
        return
    for name, want in zip((EMBED, HEAD), APART[parts], strict=True):
        np.testing.assert_allclose(got[name], want, atol=1e-5)
    assert config["tie_word_embeddings"] is False
    if "--add-new" in message:
        report, got, config = merged(here, base, adapter, "--add-new")
        np.testing.assert_allclose(got[HEAD], APART[parts][1], atol=1e-5)
        assert config["tie_word_embeddings"] is False
    if "put " in message:
        report, got, _ = merged(here, base_at(here, tie_word_embeddings=False), adapter)
        assert (set(got), report["untied"]) == ({EMBED, UP}, False)


def test_classes_that_tie_by_default(here):
    """GPT-2's ``config.json`` is silent."""

    def gpt2(name):
        return name.replace("model.embed_tokens", "transformer.wte")

    base = base_at(here, "gpt2", gpt2)
    options = ("--conv1d", "")
    report, got, config = merged(
        here, base, adapter_at(here, "table", rename=gpt2, target_modules=["up_proj", "wte"]), *options
    )
    np.testing.assert_allclose(got[HEAD], BASE[EMBED], atol=1e-6)
    np.testing.assert_allclose(got["transformer.wte.weight"], BASE[EMBED] + UPDATE, atol=1e-5)
    assert (report["untied"], config["tie_word_embeddings"]) == (True, False)


def test_names_of_a_base_without_a_head_get_their_beginning(here):
    """transformers does not load ``wte.weight`` beside ``lm_head.weight``."""

    def whole(name):
        return name.replace("model.embed_tokens", "transformer.wte").replace("model.", "transformer.")

    base = base_at(here, "gpt2", lambda name: whole(name).removeprefix("transformer."))
    adapter = adapter_at(here, "head", rename=whole, target_modules=["lm_head"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({key: x for key, x in tensors.items() if "lm_head" in key}, adapter / "adapter_model.safetensors")
    message = call("merge", base, adapter, "out", code=2)
    assert "are those of a model without one" in message
    said = message.split("--prefix ")[1].split()[0]
    _, got, _ = merged(here, base, adapter, "--prefix", said)
    assert set(got) == {HEAD, "transformer.wte.weight", whole(UP)}
    np.testing.assert_allclose(got[HEAD], BASE[EMBED] + UPDATE, atol=1e-5)


def test_nested_configurations_are_untied_where_they_are_asked(here):
    text = {"model_type": "gemma", "hidden": 6}
    base = base_at(here, "paligemma", text_config=text, vision_config={"size": 3})
    _, _, config = merged(here, base, adapter_at(here, "table"))
    wanted = {"model_type": "paligemma", "tie_word_embeddings": False, "vision_config": {"size": 3}}
    assert config == wanted | {"text_config": text | {"tie_word_embeddings": False}}


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("parts", [("head",), ("whole head",), ("whole table",), ("rows",)])
def test_encoders_and_decoders_that_share_the_embedding_stay_as_they_are(kind, parts, here):
    base = base_at(here, kind, lambda name: name.replace("embed_tokens", "shared"), is_encoder_decoder=True)
    adapter = adapter_at(here, *parts, rename=lambda name: name.replace("model.embed", "model.decoder.embed"))
    for options in ((), ("--add-new",), ("--tied", f"{HEAD}=model.shared.weight")):
        message = call("merge", base, adapter, "out", *options, code=2)
        assert f"A model of type {kind} cannot untie them" in message
        assert "Keep the adapter beside its base" in message


def test_a_type_whose_head_has_another_name(here):
    base = base_at(here, "new_model", tie_word_embeddings=True)
    message = call("merge", base, adapter_at(here, "table"), "out", code=2)
    assert f"--tied HEAD={EMBED} (HEAD is the head's name in PyTorch" in message
    _, got, _ = merged(here, base, adapter_at(here, "table"), "--tied", f"out.weight={EMBED}")
    np.testing.assert_allclose(got["out.weight"], BASE[EMBED], atol=1e-6)


def test_what_tied_names_has_to_be_there(here):
    base, adapter = base_at(here), adapter_at(here, "head")
    assert "The base has no 'b' (--tied).\n  nearest:" in call("merge", base, adapter, "out", "--tied", "a=b", code=2)
    assert "changes neither of --tied a=" in call("merge", base, adapter, "out", "--tied", f"a={EMBED}", code=2)
    base = base_at(here, head=True, tie_word_embeddings=True)
    tensors = load_file(base / "model.safetensors")
    save_file(tensors | f4({HEAD: WHOLE[HEAD]}), base / "model.safetensors")
    assert "which differ, though head and embedding are said to be one" in call("merge", base, adapter, "out", code=2)


def test_files_of_several_parts_and_of_half_precision(here):
    base = base_at(here, tie_word_embeddings=True)
    tensors = {name: x.astype(np.float16) for name, x in load_file(base / "model.safetensors").items()}
    (base / "model.safetensors").unlink()
    files = {EMBED: "model-00001-of-00002.safetensors", UP: "model-00002-of-00002.safetensors"}
    for name, file in files.items():
        save_file({name: tensors[name]}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    called("merge", base, adapter_at(here, "whole table"), "out")
    where = json.loads((here / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert where == files | {HEAD: files[UP]}
    np.testing.assert_array_equal(load_file(here / "out" / files[UP])[HEAD], tensors[EMBED])
    assert load_file(here / "out" / files[EMBED])[EMBED].dtype == np.float16


def test_an_adapter_of_peft_whose_ends_have_one_update(here):
    """Made by PEFT: without a word it may be a head of its own."""
    base = base_of("llama_tied", here)
    message = call("merge", base, PEFT / "llama_tied", "out", code=2)
    said = message.split("--tied ")[1].split()[0]
    assert called("merge", base, PEFT / "llama_tied", "out", "--tied", said)["untied"] is False
