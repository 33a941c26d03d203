"""PEFT adapters are compared with the files of their base before they are written."""

import pytest
from peft_case import FOLDER, base_files, base_of, expected, fresh, zeros
from peft_case import promotion as promotion
from peft_models import PORTS
from safetensors.numpy import load_file

import jlora
import jlora.peft
from jlora.peft import Weight

NAMED = {r"(up|down)/kernel": r"net.h.0.\1.weight", "down/bias": "net.h.0.down.bias"}


BOTH = [jlora.LoRA(rank=2, targets=".*kernel"), jlora.Full(targets="down/bias")]


@pytest.mark.parametrize("prefix", ["net.h.0.", "h.0.", "0.", "", "whole.net.h.0."])
@pytest.mark.parametrize("shards", [1, 2])
def test_a_base_that_has_every_weight(prefix, shards, tmp_path):
    tensors = {"up.weight": zeros(5, 3), "down.weight": zeros(7, 5), "down.bias": zeros(7), "other": zeros(1)}
    folder = base_files(tmp_path / "base", {prefix + name: x for name, x in tensors.items()}, shards)
    jlora.peft.save(tmp_path / "a", fresh(*BOTH), names=NAMED, base_folder=folder)
    assert "base_model.model.net.h.0.up.lora_A.weight" in load_file(tmp_path / "a" / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"net.h.0.up.weight": zeros(5, 3), "net.h.0.dwon.weight": zeros(7, 5), "net.h.0.down.bias": zeros(7)},
            r"1 of the adapter's 3 weights does not fit the base at .*base:\n"
            r"  net.h.0.down.weight is not there; nearest: net.h.0.dwon.weight",
        ),
        (
            {"h.0.up.weight": zeros(5, 4), "h.0.down.weight": zeros(5, 7), "h.0.down.bias": zeros(6)},
            r"2 of .* \(names were looked up without 'net.'\):\n  net.h.0.up.weight is \(5, 4\) there; the adapter is for "
            r"\(5, 3\) or \(3, 5\)\n|net.h.0.down.bias is \(6,\) there; the adapter is for \(7,\)",
        ),
        (
            {f"{side}.net.h.0.{name}": zeros(1) for side in ("a", "b") for name in ("up.weight", "down.weight", "down.bias")},
            r"in 2 ways: with 'a.' before them, with 'b.' before them.\n  Give the weights their whole names",
        ),
        ({"h.0.up.weight": zeros(5, 3), "0.down.weight": zeros(7, 5)}, "2 of .* do not fit the base"),
    ],
)  # fmt: skip
def test_a_base_that_lacks_a_weight(tensors, message, tmp_path):
    folder = base_files(tmp_path / "base", tensors)
    with pytest.raises(ValueError, match=message):
        jlora.peft.save(tmp_path / "a", fresh(*BOTH), names=NAMED, base_folder=folder)
    assert not (tmp_path / "a").exists()
    with pytest.raises(FileNotFoundError, match="There are no weights at"):
        jlora.peft.save(tmp_path / "a", fresh(*BOTH), names=NAMED, base_folder=tmp_path)


@pytest.mark.parametrize("kind", sorted({*PORTS} - {"attention", "gpt2_bias", "llama_tokens"}))
def test_the_bases_of_the_fixtures_have_what_is_saved_for_them(kind, tmp_path):
    port, want = PORTS[kind](), expected(kind)
    sites, params = base_of(kind, port, want["x"])
    lora = jlora.peft.load(FOLDER / kind, sites, names=port.names, params=params)
    options = {"names": port.names, "sites": sites, "params": params}
    jlora.peft.save(tmp_path / "a", lora, base_folder=FOLDER / kind / "base.safetensors", **options)


def test_a_layout_that_is_said_has_to_be_that_of_the_base(tmp_path):
    folder = base_files(tmp_path / "base", {"up.weight": zeros(3, 5), "down.weight": zeros(5, 7)})
    jlora.peft.save(tmp_path / "a", fresh(), base_folder=folder)  # Conv1D: an adapter for it is the same
    names = {"(.*)/kernel": Weight(r"\1.weight", "out_in")}
    with pytest.raises(ValueError, match=r"down.weight is \(5, 7\) there; the adapter is for \(7, 5\)\n"):
        jlora.peft.save(tmp_path / "b", fresh(), names=names, base_folder=folder)
