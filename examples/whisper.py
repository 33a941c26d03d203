"""Whisper in Flax Linen: log-mel features, an encoder with convolutions, a decoder with cross-attention, greedy decoding.

Every projection is an ordinary ``nn.Dense`` and nothing here knows about adapters. ``load`` reads tiny.en (37M parameters)
from a file of CTranslate2. A window may be shorter than the 30 s it was trained on.
"""

import dataclasses
import functools
import itertools
import json
import struct
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from fetch import fetch
from tokenizers import Tokenizer

RATE = 16_000  # samples a second
HOP = 160  # samples a frame; two frames become one position of the encoder
FFT = 400  # samples that a frame looks at

norm = functools.partial(nn.LayerNorm, epsilon=1e-5)
gelu = functools.partial(nn.gelu, approximate=False)


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a Whisper; the default is tiny.en."""

    width: int = 384
    heads: int = 6
    layers: int = 4  # of the encoder, and of the decoder
    vocab: int = 51_864
    mels: int = 80
    length: int = 448  # tokens at most


# The model


class Attention(nn.Module):
    """Multi-head attention; keys and values are computed apart, since those of the audio serve every token."""

    config: Config

    def setup(self):
        self.query, self.value, self.out = (nn.Dense(self.config.width) for _ in range(3))
        self.key = nn.Dense(self.config.width, use_bias=False)

    def split(self, x):
        return x.reshape(*x.shape[:-1], self.config.heads, -1)  # (batch, length, heads, head_dim)

    def keys_values(self, x):
        return self.split(self.key(x)), self.split(self.value(x))

    def __call__(self, x, keys_values, mask=None):
        mixed = jax.nn.dot_product_attention(self.split(self.query(x)), *keys_values, mask=mask)
        return self.out(mixed.reshape(x.shape))


class Block(nn.Module):
    """Self-attention, cross-attention (of the decoder), feed-forward, each on a normalised copy of the stream."""

    config: Config
    decoder: bool

    def setup(self):
        self.attention, self.attention_norm = Attention(self.config), norm()
        if self.decoder:
            self.cross, self.cross_norm = Attention(self.config), norm()
        self.up, self.down, self.mlp_norm = nn.Dense(4 * self.config.width), nn.Dense(self.config.width), norm()

    def __call__(self, x, audio=None, mask=None, cache=None, start=0):
        """``audio`` holds keys and values of what is heard, ``cache`` those of earlier tokens."""
        y = self.attention_norm(x)
        seen = self.attention.keys_values(y)
        if cache is not None:
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
            seen = put(cache[0], seen[0]), put(cache[1], seen[1])
        x = x + self.attention(y, seen, mask)
        if self.decoder:
            x = x + self.cross(self.cross_norm(x), audio)
        return x + self.down(gelu(self.up(self.mlp_norm(x)))), seen


def sinusoids(length: int, width: int) -> np.ndarray:
    """Positions of the encoder, which are not trained: sines, then cosines, of wavelengths from 2π to 20,000π."""
    angles = np.outer(np.arange(length), 10_000.0 ** -np.linspace(0, 1, width // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


class Encoder(nn.Module):
    """Maps log-mel frames ``(batch, frames, mels)`` to ``(batch, frames / 2, width)``."""

    config: Config

    @nn.compact
    def __call__(self, mel):
        c, conv = self.config, functools.partial(nn.Conv, self.config.width, (3,), padding=1)
        x = gelu(conv(strides=2, name="conv2")(gelu(conv(name="conv1")(mel))))
        x = x + sinusoids(x.shape[1], c.width)
        for i in range(c.layers):
            x, _ = Block(c, decoder=False, name=f"blocks_{i}")(x)
        return norm(name="norm")(x)


class Decoder(nn.Module):
    """Maps tokens and what is heard to logits; the head is the embedding, transposed."""

    config: Config

    def setup(self):
        c = self.config
        self.embed = nn.Embed(c.vocab, c.width)
        self.positions = self.param("positions", nn.initializers.normal(), (c.length, c.width))
        self.blocks, self.norm = [Block(c, decoder=True) for _ in range(c.layers)], norm()

    def keys_values(self, audio):
        return [block.cross.keys_values(audio) for block in self.blocks]

    def __call__(self, tokens, audio, caches=None, start=0):
        """Logits ``(batch, length, vocab)`` of tokens ``(batch, length)`` from position ``start``, and the caches that follow."""
        positions = start + jnp.arange(tokens.shape[1])
        keys = jnp.arange(tokens.shape[1] if caches is None else caches[0][0].shape[1])
        x, visible, new = self.embed(tokens) + self.positions[positions], (keys <= positions[:, None])[None, None], []
        for i, block in enumerate(self.blocks):
            x, cache = block(x, audio[i], visible, caches and caches[i], start)
            new.append(cache)
        return self.embed.attend(self.norm(x)), new


class Whisper(nn.Module):
    """Speech to text."""

    config: Config

    def setup(self):
        self.encoder, self.decoder = Encoder(self.config), Decoder(self.config)

    def listen(self, mel):
        """What is heard: the keys and values of the audio, for every block of the decoder."""
        return self.decoder.keys_values(self.encoder(mel))

    def write(self, tokens, audio, caches, start):
        """Logits of tokens that follow those in ``caches``, and the caches that follow."""
        return self.decoder(tokens, audio, caches, start)

    def __call__(self, mel, tokens):
        """Logits ``(batch, length, vocab)`` of the tokens that follow ``tokens`` where ``mel`` is heard."""
        return self.decoder(tokens, self.listen(mel))[0]


# Its words


@dataclasses.dataclass(frozen=True, eq=False)  # so that it can be a static argument
class Vocabulary:
    """Text as tokens.

    Attributes:
        tokenizer: Of plain text.
        prompt: The tokens that every transcript starts with.
        end: The token that ends one.
        bias: Added to logits, shape ``(vocab,)``: ``-inf`` for what is no text, such as times, music, names of speakers.
    """

    tokenizer: Tokenizer
    prompt: tuple[int, ...]
    end: int
    bias: np.ndarray

    def encode(self, text: str) -> list[int]:
        return [*self.prompt, *self.tokenizer.encode(f" {text}", add_special_tokens=False).ids, self.end]

    def decode(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode([int(token) for token in tokens if token != self.end]).strip()


@functools.partial(jax.jit, static_argnames=("model", "vocabulary", "length"))
def greedy(model: Whisper, params: dict, vocabulary: Vocabulary, mel: jax.Array, length: int) -> jax.Array:
    """Writes what is heard in ``mel``, shape ``(batch, frames, mels)``, always taking the likeliest token.

    Returns:
        The tokens after the prompt, ``length`` with it, and after the end only the end; shape ``(batch, length - prompt)``.
    """
    c, prompt, end = model.config, jnp.asarray(vocabulary.prompt), vocabulary.end
    audio = model.apply(params, mel, method="listen")
    nothing = jnp.zeros((len(mel), length, c.heads, c.width // c.heads))

    def step(carry, position):
        token, caches = carry
        logits, caches = model.apply(params, token[:, None], audio, caches, position, method="write")
        likeliest = jnp.where(token == end, end, jnp.argmax(logits[:, 0] + vocabulary.bias, axis=-1))
        token = jnp.where(position + 1 < len(prompt), prompt[(position + 1) % len(prompt)], likeliest)
        return (token, caches), token

    start = jnp.full(len(mel), prompt[0]), [(nothing, nothing)] * c.layers
    _, tokens = jax.lax.scan(step, start, jnp.arange(length - 1))
    return tokens.T[:, len(prompt) - 1 :]


# Its ears


def log_mel(audio: np.ndarray, seconds: float, mels: int = 80) -> np.ndarray:
    """Log-mel features ``(frames, mels)`` of 16 kHz ``audio``, padded with silence to ``seconds``."""
    audio = np.pad(audio, (0, round(seconds * RATE) - len(audio)))
    framed = np.lib.stride_tricks.sliding_window_view(np.pad(audio, FFT // 2, mode="reflect"), FFT)[:-1:HOP]
    power = np.abs(np.fft.rfft(framed * np.hanning(FFT + 1)[:-1])) ** 2
    log = np.log10(np.maximum(power @ mel_filters(mels).T, 1e-10))
    return ((np.maximum(log, log.max() - 8) + 4) / 4).astype(np.float32)


@functools.cache
def mel_filters(mels: int) -> np.ndarray:
    """Triangles on the mel scale (linear to 1 kHz, then logarithmic), each of area one; shape ``(mels, FFT // 2 + 1)``."""
    linear, step = 3 / 200, np.log(6.4) / 27
    scale = np.arange(mels + 2) * (15 + np.log(RATE / 2_000) / step) / (mels + 1)
    hertz = np.where(scale < 15, scale / linear, 1_000 * np.exp(step * (scale - 15)))[:, None]
    bins = np.fft.rfftfreq(FFT, 1 / RATE)
    low, mid, high = hertz[:-2], hertz[1:-1], hertz[2:]
    return np.maximum(0, np.minimum((bins - low) / (mid - low), (high - bins) / (high - mid))) * 2 / (high - low)


# Its weights


def load() -> tuple[Whisper, dict, Vocabulary]:
    """Loads Whisper tiny.en, in fp32.

    Returns:
        The model, its variables and its vocabulary.
    """
    folder, config = fetch("whisper"), Config()
    params = _variables(read_ctranslate2(folder / "model.bin"), config)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = "<|startoftranscript|>", "<|notimestamps|>", "<|endoftext|>"
    *prompt, end = (tokenizer.token_to_id(token) for token in special)
    bias = np.zeros(config.vocab, np.float32)
    bias[json.loads((folder / "config.json").read_text(encoding="utf-8"))["suppress_ids"]] = -np.inf
    bias[end + 1 :] = -np.inf
    return Whisper(config), params, Vocabulary(tokenizer, tuple(prompt), end, bias)


def read_ctranslate2(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a ``model.bin``, by name.

    Little-endian: version, name of the model, revision, number of arrays; then of each its name, rank, dimensions, type,
    size in bytes, and bytes. A name is its length in two bytes, its text, and a zero.
    """
    types = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    arrays = {}
    with path.open("rb") as file:

        def number(kind: str) -> int:
            return struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]

        def text() -> str:
            return file.read(number("H"))[:-1].decode()

        _version, _model, _revision = number("I"), text(), number("I")
        for _ in range(number("I")):
            name, shape = text(), [number("I") for _ in range(number("B"))]
            kind, size = types[number("B")], number("I")
            arrays[name] = np.frombuffer(file.read(size), kind).reshape(shape)
    return arrays


def _variables(arrays: dict[str, np.ndarray], config: Config) -> dict:
    """Lays the arrays out as Linen names them: kernels (in, out), projections that were fused apart."""

    def get(name):
        return jnp.asarray(arrays[name], jnp.float32)

    def layer_norm(name):
        return {"scale": get(f"{name}/gamma"), "bias": get(f"{name}/beta")}

    def dense(name, parts=1):
        kernels, biases = get(f"{name}/weight").T, get(f"{name}/bias")
        pairs = zip(jnp.split(kernels, parts, axis=1), jnp.split(biases, parts), strict=True)
        return [{"kernel": kernel, "bias": bias} for kernel, bias in pairs]

    def attention(name, cross):
        *rest, (out,) = [dense(f"{name}/linear_{i}", n) for i, n in enumerate((1, 2, 1) if cross else (3, 1))]
        query, key, value = itertools.chain(*rest)
        return {"query": query, "key": {"kernel": key["kernel"]}, "value": value, "out": out}

    def block(name, decoder):
        tree = {"attention": attention(f"{name}/self_attention", cross=False)}
        tree["attention_norm"] = layer_norm(f"{name}/self_attention/layer_norm")
        if decoder:
            tree["cross"] = attention(f"{name}/attention", cross=True)
            tree["cross_norm"] = layer_norm(f"{name}/attention/layer_norm")
        (up,), (down,) = dense(f"{name}/ffn/linear_0"), dense(f"{name}/ffn/linear_1")
        return tree | {"mlp_norm": layer_norm(f"{name}/ffn/layer_norm"), "up": up, "down": down}

    def conv(name):
        return {"kernel": get(f"{name}/weight").transpose(2, 1, 0), "bias": get(f"{name}/bias")}  # (time, in, out)

    def stack(name, decoder):
        blocks = {f"blocks_{i}": block(f"{name}/layer_{i}", decoder) for i in range(config.layers)}
        return blocks | {"norm": layer_norm(f"{name}/layer_norm")}

    encoder = stack("encoder", decoder=False) | {name: conv(f"encoder/{name}") for name in ("conv1", "conv2")}
    embeddings = {"embed": {"embedding": get("decoder/embeddings/weight")}}
    decoder = stack("decoder", decoder=True) | embeddings | {"positions": get("decoder/position_encodings/encodings")}
    return {"params": {"encoder": encoder, "decoder": decoder}}
