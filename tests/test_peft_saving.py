"""What can be written as a PEFT adapter; and what is refused."""

import json
import shutil
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from peft_case import FOLDER, PARAMS, SITES, base_files, base_of, edit, expected, fresh, zeros
from peft_case import promotion as promotion
from peft_case import saved as saved
from peft_models import PORTS
from safetensors.numpy import load_file

import jlora
import jlora.peft
from jlora.peft import Weight


def test_arguments_in_another_order(saved):
    with pytest.raises(ValueError, match=r"load\(folder, sites\)"):
        jlora.peft.load(saved, {})
    with pytest.raises(TypeError, match="A folder is given by its path"):
        jlora.peft.load(SITES, saved)
    with pytest.raises(ValueError, match="The sites were found for other parameters"):
        jlora.peft.load(saved, SITES, params={"up": PARAMS["up"]})


def test_saving_is_refused(tmp_path, saved):
    with pytest.raises(FileExistsError, match="already a PEFT adapter"):
        jlora.peft.save(saved, fresh())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="is not a PEFT adapter: it is left alone"):
        jlora.peft.save(tmp_path / "other", fresh(), overwrite=True)
    (tmp_path / "link").symlink_to(saved)
    with pytest.raises(FileExistsError, match="left alone"):
        jlora.peft.save(tmp_path / "link", fresh(), overwrite=True)
    before = (saved / "adapter_model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="is not finite"):
        jlora.peft.save(saved, jax.tree.map(lambda x: x * jnp.nan, fresh()), overwrite=True)
    assert (saved / "adapter_model.safetensors").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    jlora.peft.save(saved, jax.tree.map(lambda x: 2 * x, fresh()), overwrite=True)
    assert (saved / "adapter_model.safetensors").read_bytes() != before


def written_rate(folder, *rules, **options):
    jlora.peft.save(folder, fresh(*rules), **options)
    return json.loads((folder / "adapter_config.json").read_text())["lora_dropout"]


def test_one_rate_of_dropout_is_that_of_the_file(tmp_path):
    up, down = (jlora.LoRA(rank=2, dropout=0.25, targets=f"{name}/kernel") for name in ("up", "down"))
    assert written_rate(tmp_path / "a", up, down) == 0.25
    again = jlora.peft.load(tmp_path / "a", SITES)
    assert {x.dropout for x in again.values()} == {0.25}
    other = jlora.LoRA(rank=2, targets="down/kernel")
    with pytest.raises(
        ValueError, match=r"have several: 0\.0 at 'down/kernel', 0\.25 at 'up/kernel'.*\n.*dropout=0\.25"
    ):
        written_rate(tmp_path / "b", up, other)
    assert not (tmp_path / "b").exists()
    assert written_rate(tmp_path / "b", up, other, dropout=0.5) == 0.5
    for wrong in (1.0, -0.1, float("nan"), "0.1", True):
        with pytest.raises(ValueError, match=r"dropout must be a rate from 0 up to"):
            written_rate(tmp_path / "c", up, dropout=wrong)


def test_peft_has_no_dropout_for_parameters(tmp_path):
    names = {"down/kernel": Weight("down.weight", nesting=0)}
    rule = jlora.LoRA(rank=2, dropout=0.25, targets=".*kernel")
    with pytest.raises(
        ValueError, match=r"no dropout for parameters .* 'down.weight', and refuses.*0\.25.*\n.*dropout=0\.0"
    ):
        written_rate(tmp_path / "a", rule, names=names)
    assert written_rate(tmp_path / "a", rule, names=names, dropout=0.0) == 0.0


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.complex64, jnp.float8_e5m2, bool, "half-way"])
def test_dtypes_that_destroy_values_are_refused(dtype, tmp_path, saved):
    for call in (
        lambda: jlora.peft.save(tmp_path / "b", fresh(), dtype=dtype),
        lambda: jlora.peft.load(saved, SITES, dtype=dtype),
        lambda: jlora.peft.read(saved, dtype=dtype),
    ):
        with pytest.raises(ValueError, match=r"dtype must be one of float64, float32, float16, bfloat16\.\n  got: "):
            call()
    assert not (tmp_path / "b").exists()


def test_parameters_in_place_of_an_adapter(tmp_path):
    with pytest.raises(
        TypeError, match=r"(?s)lora must be a dict.*got: parameters, dict with the array 'down/bias' \(7,\)"
    ):
        jlora.peft.save(tmp_path / "b", PARAMS)


def test_leaves_without_a_place_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"There are no factors in this adapter.*\n.*jlora\.export\.save.*LoRA rule"):
        jlora.peft.save(tmp_path / "a", fresh(jlora.Full(targets="down/bias")))
    lora = fresh(jlora.Full(targets="down/kernel"), jlora.LoRA(rank=2, targets="up/kernel"))
    with pytest.raises(ValueError, match="PEFT saves the module 'down' whole, and 'down/bias' was not trained"):
        jlora.peft.save(tmp_path / "a", lora)
    older = lora | {"down/kernel": jlora.FullWeight(lora["down/kernel"].value, lora["down/kernel"].base)}
    with pytest.raises(ValueError, match=r"How the axes of 'down.weight' lie here, .*\n  Pass what tells: sites="):
        jlora.peft.save(tmp_path / "a", older)
    jlora.peft.save(tmp_path / "a", older, sites=SITES, params=PARAMS)
    shutil.rmtree(tmp_path / "a")
    other = jlora.sites(lambda p, x: x @ p["w"], {"w": jnp.ones((3, 5))}, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match="made for another base than sites"):
        jlora.peft.save(tmp_path / "a", lora, sites=other)
    alien = jlora.init(jax.random.key(0), {"w": jnp.ones((3, 5))}, other, jlora.LoRA(rank=2, targets="w"))
    with pytest.raises(ValueError, match="made for 2 different bases"):
        jlora.peft.save(tmp_path / "a", fresh() | alien)
    old = {"up/kernel": jlora.LowRank(**{**vars(fresh()["up/kernel"]), "use": ""})}
    with pytest.raises(ValueError, match="How the model uses 'up/kernel' is not part of this adapter"):
        jlora.peft.save(tmp_path / "a", old)
    jlora.peft.save(tmp_path / "a", old, sites=SITES)


def test_a_grouped_convolution_is_refused(tmp_path):
    def fn(params, x):
        names = ("NWC", "WIO", "NWC")
        return jax.lax.conv_general_dilated(x, params["kernel"], [1], "VALID", dimension_numbers=names, feature_group_count=2)  # fmt: skip

    params = {"kernel": jnp.ones((3, 2, 6))}
    sites = jlora.sites(fn, params, jnp.ones((1, 5, 4)))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="kernel"))
    with pytest.raises(ValueError, match="a convolution in groups, or transposed"):
        jlora.peft.save(tmp_path / "a", lora, names={"kernel": "conv.weight"})


def dilated(params, x, by=2):
    names = ("NWC", "WIO", "NWC")
    return jax.lax.conv_general_dilated(x, params["kernel"], [1], "SAME", rhs_dilation=[by], dimension_numbers=names)


def test_a_dilated_convolution_is_refused(tmp_path):
    """PEFT makes lora_A a convolution without the dilation; where the window has one place, there is none."""
    params, x, names = {"kernel": jnp.ones((3, 4, 6))}, jnp.ones((1, 9, 4)), {"kernel": "conv.weight"}
    rules = jlora.LoRA(rank=2, targets="kernel")
    sites = jlora.sites(dilated, params, x)
    lora = jlora.init(jax.random.key(0), params, sites, rules)
    with pytest.raises(ValueError, match=r"'kernel', a dilated convolution, .*\n  Merge it instead"):
        jlora.peft.save(tmp_path / "a", lora, names=names)
    jlora.save(tmp_path / "j", lora)
    with pytest.raises(ValueError, match="a dilated convolution"):
        jlora.peft.save(tmp_path / "a", jlora.load(tmp_path / "j"), names=names)
    plain = jlora.init(jax.random.key(0), params, jlora.sites(partial(dilated, by=1), params, x), rules)
    jlora.peft.save(tmp_path / "a", plain, names=names)
    with pytest.raises(ValueError, match=r"'kernel' is a dilated convolution, .*no update of this weight"):
        jlora.peft.load(tmp_path / "a", sites, names=names)
    one = {"kernel": jnp.ones((1, 4, 6))}
    assert not jlora.sites(dilated, one, x)["kernel"].dilated


def test_a_tied_table_needs_both_names(tmp_path):
    def fn(params, ids):
        return params["embed"][ids] @ params["embed"].T

    params = {"embed": jnp.ones((11, 3))}
    sites = jlora.sites(fn, params, jnp.arange(4))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="embed"))
    with pytest.raises(ValueError, match=r"Name both: names=\{'embed': \('embed', 'lm_head.weight'\)\}"):
        jlora.peft.save(tmp_path / "a", lora)


def test_targets_are_a_pattern_where_a_name_is_the_end_of_another(tmp_path):
    """PEFT takes 'proj' for the end of 'block.proj', which is a norm; a pattern has to match all of a name."""
    params = {"proj": {"kernel": jnp.ones((4, 4))}, "block": {"proj": {"scale": jnp.ones(4)}}}
    sites = jlora.sites(lambda p, x: x @ p["proj"]["kernel"] * p["block"]["proj"]["scale"], params, jnp.ones((2, 4)))
    lora = jlora.init(jax.random.key(0), params, sites, jlora.LoRA(rank=2, targets="proj/kernel"))

    def targets(**how):
        jlora.peft.save(tmp_path / "a", lora, overwrite=True, **how)
        assert set(jlora.peft.load(tmp_path / "a", sites, names=how.get("names"))) == {"proj/kernel"}
        return json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_modules"]

    assert targets() == "(?:proj)"
    names = {"proj/kernel": "a.proj.weight", "block/proj/scale": "block.norm.weight"}
    assert targets(names=names) == ["a.proj"]
    base_files(tmp_path / "b", {"a.proj.weight": zeros(4, 4), "b.a.proj.weight": zeros(4)})
    assert targets(names=names, base_folder=tmp_path / "b") == r"(?:a\.proj)"


def test_rows_that_are_no_heads_are_refused(tmp_path):
    with pytest.raises(ValueError, match="5 rows cannot be 4 heads of rotary pairs"):
        jlora.peft.save(tmp_path / "a", fresh(), names={"up/kernel": Weight("up.weight", rotary_heads=4)})


def test_a_tied_table_of_which_one_use_is_replaced_is_refused(tmp_path):
    """PEFT unties them; with ensure_weight_tying it does not."""
    port, want = PORTS["llama_tied"](), expected("llama_tied")
    sites, params = base_of("llama_tied", port, want["x"])
    names = dict(port.names)
    rule = [jlora.Full(targets="embed"), jlora.LoRA(rank=2, targets="layers/q")]
    jlora.peft.save(tmp_path / "a", jlora.init(jax.random.key(0), params, sites, rule), names=names, sites=sites)
    both = jlora.peft.load(tmp_path / "a", sites, names=names, params=params)
    assert isinstance(both["embed"], jlora.FullWeight)
    edit(tmp_path / "a", {"modules_to_save": ["model.embed_tokens"]}, {"base_model.model.lm_head.weight": None})
    with pytest.raises(
        ValueError, match=r"'embed' is one leaf here, but the adapter replaces only some .* not lm_head\.weight"
    ):
        jlora.peft.load(tmp_path / "a", sites, names=names, params=params)
    edit(tmp_path / "a", {"ensure_weight_tying": True})
    jlora.peft.load(tmp_path / "a", sites, names=names, params=params)


def test_trained_tokens_of_a_tie_that_peft_does_not_know_are_refused(tmp_path):
    """It asks the configuration of a model of transformers; a tie by hand it does not see, and changes the lookup alone."""
    port, want = PORTS["llama_tokens"](), expected("llama_tokens")
    sites, params = base_of("llama_tokens", port, want["x"])
    shutil.copytree(FOLDER / "llama_tokens", tmp_path / "a")
    for changed in ({"base_model_class": "Net", "parent_library": "__main__"}, None):
        edit(tmp_path / "a", {"auto_mapping": changed})
        with pytest.raises(
            ValueError,
            match=r"only some .* not lm_head\.weight.\n  Give the base a leaf for each\. Or, if PEFT's model",
        ):
            jlora.peft.load(tmp_path / "a", sites, names=port.names, params=params)
    edit(tmp_path / "a", {"auto_mapping": None, "base_model_name_or_path": "me/my-base"})
    lora = jlora.peft.load(tmp_path / "a", sites, names=port.names, params=params)
    np.testing.assert_allclose(jlora.wrap(port.fn)(params, lora, want["x"]), want["after"], atol=1e-5)


def test_what_is_inside_a_saved_module_is_saved(saved):
    """Also if it was trained but a little, which must not pass for the base's rounding."""
    edit(
        saved,
        {"target_modules": ["up"]},
        {k: None for k in load_file(saved / "adapter_model.safetensors") if ".down." in k},
    )
    little = np.full((7, 5), 1.004, np.float32)
    edit(saved, {}, {"base_model.model.down.weight": little})
    with pytest.raises(ValueError, match="is not what 'down/kernel' is in the base"):
        jlora.peft.load(saved, SITES, params=PARAMS)
    bias = {"base_model.model.down.bias": np.zeros(7, np.float32)}
    edit(saved, {"modules_to_save": ["own"]}, bias)  # PEFT compares the ends of names
    np.testing.assert_array_equal(jlora.peft.load(saved, SITES)["down/kernel"].value, little.T)


def test_biases_that_peft_writes_twice(saved):
    """As with ``bias="all"`` and ``modules_to_save``; one of the two is read, whatever the base or the file is asked for."""
    low = {k: None for k in load_file(saved / "adapter_model.safetensors") if ".down." in k}
    down, bias = "base_model.model.down", np.full(7, 2.0, np.float32)
    whole = {f"{down}.weight": np.ones((7, 5), np.float32), f"{down}.bias": bias}
    twice = {f"{down}.modules_to_save.bias": bias, f"{down}.original_module.bias": 0 * bias}
    edit(saved, {"target_modules": ["up"], "bias": "all"}, low | whole | twice)
    with pytest.raises(
        ValueError, match=r"2 tensors of the adapter are for nothing in the base: .*modules_to_save.bias"
    ):
        jlora.peft.load(saved, SITES, params=PARAMS)
    edit(saved, {"modules_to_save": ["down"]})
    np.testing.assert_array_equal(jlora.peft.load(saved, SITES)["down/bias"].value, bias)
    np.testing.assert_array_equal(jlora.peft.read(saved)[0]["down.bias"].value, bias)
    edit(saved, tensors={f"{down}.modules_to_save.bias": bias + 1})
    for call in (lambda: jlora.peft.load(saved, SITES), lambda: jlora.peft.read(saved)):
        with pytest.raises(
            ValueError, match=r"down.modules_to_save.bias' is a copy of '.*down.bias'.*differs.*\n.*changed"
        ):
            call()
    edit(saved, tensors={f"{down}.bias": None})
    with pytest.raises(ValueError, match=r"for nothing in the base"):
        jlora.peft.load(saved, SITES)


def test_layers_that_a_pattern_left_out_may_be_missing(tmp_path):
    port, want = PORTS["llama"](), expected("llama")
    sites, _ = base_of("llama", port, want["x"])
    shutil.copytree(FOLDER / "llama", tmp_path / "a")
    gone = {k: None for k in load_file(tmp_path / "a" / "adapter_model.safetensors") if ".layers.1." in k}
    edit(tmp_path / "a", {"target_modules": r".*layers\.0\..*_proj"}, gone)
    assert not bool(jlora.peft.load(tmp_path / "a", sites, names=port.names)["layers/q"].delta()[1].any())
