"""``jlora merge`` of what PEFT adds beside factors: biases of B, tokens, parameters, heads."""

import json
import re
import shutil

import numpy as np
from cli_case import PEFT, base_of, call, called
from safetensors.numpy import load_file, save_file


def test_biases_of_b_are_added_to_biases(here):
    """``lora_bias``: PEFT adds the bias of B, times the scale."""
    base = base_of("gpt2", here)
    shutil.copytree(PEFT / "gpt2_bias", here / "a")
    file = here / "a" / "adapter_model.safetensors"
    found = {k: x for k, x in load_file(file).items() if ".lora_" in k}
    save_file(found, file)
    config = json.loads((here / "a" / "adapter_config.json").read_text())
    (here / "a" / "adapter_config.json").write_text(json.dumps(config | {"bias": "none"}))
    sites = {s["path"]: s for s in called("info", "a")["sites"]}
    bias = sites["transformer.h.1.attn.c_attn.bias"]
    assert (bias["use"], bias["shape"], bias["norm"]) == ("bias", [36], None)
    assert sites["transformer.h.1.attn.c_attn.weight"]["norm"] > 0
    got = called("merge", base, "a", "out")
    name = "transformer.h.1.attn.c_attn.bias"
    assert name in got["replaced"]
    key = "base_model.model.transformer.h.1.attn.c_attn.lora_B.bias"
    want = load_file(base / "model.safetensors")[name] + found[key] * config["lora_alpha"] / config["r"]
    np.testing.assert_allclose(load_file(here / "out" / "model.safetensors")[name], want, atol=1e-6)
    call("merge", base, "a", "bare", "--prefix", "transformer.=transformer.")


def test_trained_tokens_without_and_with_their_base(here):
    row = next(s for s in called("info", PEFT / "llama_tokens")["sites"] if s["use"] == "rows")
    assert (row["path"], row["shape"], row["parameters"]) == ("model.embed_tokens.weight", [2, 24], 48)
    assert re.search(r"embed_tokens.weight +rows +2×24 ", call("info", PEFT / "llama_tokens"))
    assert "--base BASE" in call("resize", PEFT / "llama_tokens", "a", "--rank", 1, code=2)
    base = base_of("llama_tokens", here)
    call("resize", PEFT / "llama_tokens", "a", "--rank", 1, "--base", base)
    rows = load_file(PEFT / "llama_tokens" / "adapter_model.safetensors")
    table = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    table[[1, 9]] = next(x for key, x in rows.items() if "trainable_tokens" in key)
    found = load_file(here / "a" / "adapter_model.safetensors")
    np.testing.assert_allclose(found["base_model.model.model.embed_tokens.weight"], table, atol=1e-6)
    assert "Leave out --base" in call("resize", PEFT / "llama", "b", "--rank", 1, "--base", base, code=2)


def parameter_adapter(folder, shape, rank=2):
    """Factors of a parameter as such, ``target_parameters``: of experts if it has three axes."""
    n, (rows, columns) = (shape[0] if len(shape) == 3 else 1), shape[-2:]
    rng = np.random.default_rng(0)
    a = rng.normal(size=(rank * n, columns)).astype(np.float32)
    b = rng.normal(size=(rows, rank * n)).astype(np.float32)
    folder.mkdir()
    save_file(
        {"base_model.model.mix.lora_A.weight": a, "base_model.model.mix.lora_B.weight": b},
        folder / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_parameters": ["mix.w"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return a, b


def test_square_parameters_are_as_peft_has_them(here):
    """Two axes: B A as they are, whatever the module; of three, the file does not tell."""
    (here / "base").mkdir()
    save_file({"mix.w": np.zeros((5, 5), np.float32)}, here / "base" / "model.safetensors")
    a, b = parameter_adapter(here / "two", (5, 5))
    call("merge", "base", "two", "out")
    np.testing.assert_allclose(load_file(here / "out" / "model.safetensors")["mix.w"], b @ a, atol=1e-5)
    save_file({"mix.w": np.zeros((3, 5, 5), np.float32)}, here / "base" / "model.safetensors")
    assert "is (3, 5, 5) in the base" in call("merge", "base", "two", "x", code=2)
    parameter_adapter(here / "new", (3, 5, 5))
    assert "depends on the module (is_transposed)" in call("merge", "base", "new", "x", code=2)
