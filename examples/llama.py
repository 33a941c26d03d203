"""A small Llama in Flax Linen: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied head.

Every projection is an ordinary ``nn.Dense`` without bias, and nothing here knows about adapters. The same code runs
SmolLM2-135M and a 0.9M-parameter toy; they differ in ``Config`` only.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Config:
    """Shape of a Llama.

    Args:
        vocab: Number of tokens.
        width: Size of the residual stream.
        hidden: Size of the feed-forward layer.
        layers: Number of blocks.
        heads: Number of query heads; ``width`` is divided among them.
        kv_heads: Number of key and value heads; divides ``heads``.
        max_length: Longest sequence the model was trained on.
        theta: Base of the rotary frequencies.
        eps: Added to the mean square in RMSNorm.
        rope_pairs: Whether rotary positions turn neighbours ``(x0, x1), (x2, x3), ...`` (as in the paper) rather than
            the two halves ``(x0, x[d/2]), ...`` (as in most checkpoints).
    """

    vocab: int
    width: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    max_length: int
    theta: float = 10_000.0
    eps: float = 1e-5
    rope_pairs: bool = False

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.width // self.heads


def rope(x: jax.Array, positions: jax.Array, theta: float, pairs: bool) -> jax.Array:
    """Turns every pair of features by an angle that grows with position; ``x`` is ``(batch, length, heads, dim)``."""
    half = x.shape[-1] // 2
    angles = jnp.outer(positions.astype(float), theta ** (-jnp.arange(half) / half))  # (length, half)
    cos, sin = jnp.cos(angles)[None, :, None], jnp.sin(angles)[None, :, None]
    first, second = (x[..., 0::2], x[..., 1::2]) if pairs else jnp.split(x, 2, axis=-1)
    turned = first * cos - second * sin, first * sin + second * cos
    return jnp.stack(turned, axis=-1).reshape(x.shape) if pairs else jnp.concatenate(turned, axis=-1)


def dense(features: int) -> nn.Dense:
    """Returns a projection as Llama uses it everywhere: no bias."""
    return nn.Dense(features, use_bias=False)


class Attention(nn.Module):
    """Causal grouped-query attention, with an optional cache of earlier keys and values."""

    config: Config

    def setup(self):
        c = self.config
        self.query = dense(c.heads * c.head_dim)
        self.key = dense(c.kv_heads * c.head_dim)
        self.value = dense(c.kv_heads * c.head_dim)
        self.out = dense(c.width)

    def __call__(self, x, positions, cache=None):
        c = self.config

        def split(y):
            return y.reshape(*y.shape[:-1], -1, c.head_dim)  # (batch, length, heads, head_dim)

        query = rope(split(self.query(x)), positions, c.theta, c.rope_pairs)
        key = rope(split(self.key(x)), positions, c.theta, c.rope_pairs)
        value = split(self.value(x))
        if cache is not None:
            put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=positions[0], axis=1)
            key, value = cache = put(cache[0], key), put(cache[1], value)
        visible = jnp.arange(key.shape[1])[None] <= positions[:, None]  # (length, keys)
        mixed = jax.nn.dot_product_attention(query, key, value, mask=visible[None, None])
        return self.out(mixed.reshape(x.shape)), cache


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``."""

    config: Config

    def setup(self):
        self.gate, self.up, self.down = dense(self.config.hidden), dense(self.config.hidden), dense(self.config.width)

    def __call__(self, x):
        return self.down(nn.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention, then feed-forward, each on a normalised copy of the stream."""

    config: Config

    def setup(self):
        self.attention_norm = nn.RMSNorm(epsilon=self.config.eps)
        self.attention = Attention(self.config)
        self.mlp_norm = nn.RMSNorm(epsilon=self.config.eps)
        self.mlp = MLP(self.config)

    def __call__(self, x, positions, cache=None):
        mixed, cache = self.attention(self.attention_norm(x), positions, cache)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


class Llama(nn.Module):
    """A decoder whose output head is its embedding, transposed."""

    config: Config

    def setup(self):
        self.embed = nn.Embed(self.config.vocab, self.config.width)
        self.blocks = [Block(self.config) for _ in range(self.config.layers)]
        self.norm = nn.RMSNorm(epsilon=self.config.eps)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens ``(batch, length)`` to logits ``(batch, length, vocab)``."""
        x, positions = self.embed(tokens), jnp.arange(tokens.shape[1])
        for block in self.blocks:
            x, _ = block(x, positions)
        return self.embed.attend(self.norm(x))

    def decode(self, token: jax.Array, position: jax.Array, caches: list) -> tuple[jax.Array, list]:
        """Maps one token a row ``(batch,)`` at ``position`` to logits ``(batch, vocab)`` and the caches that follow."""
        x, new = self.embed(token[:, None]), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = block(x, position[None], cache)
            new.append(cache)
        return self.embed.attend(self.norm(x))[:, 0], new


@functools.partial(jax.jit, static_argnums=(0, 3))
def greedy(model: Llama, params, prompt: jax.Array, steps: int) -> jax.Array:
    """Continues ``prompt``, shape ``(batch, length)``, by ``steps`` tokens, always taking the likeliest.

    The prompt goes through the same one-token step as the continuation, so there is one small program to compile.

    Returns:
        The new tokens, shape ``(batch, steps)``.
    """
    config, (batch, given) = model.config, prompt.shape
    nothing = jnp.zeros((batch, given + steps, config.kv_heads, config.head_dim))
    caches = [(nothing, nothing)] * config.layers

    def step(carry, position):
        token, caches = carry
        logits, caches = model.apply(params, token, position, caches, method="decode")
        likeliest = jnp.argmax(logits, axis=-1).astype(prompt.dtype)
        token = jnp.where(position + 1 < given, prompt[:, (position + 1) % given], likeliest)
        return (token, caches), token

    _, tokens = jax.lax.scan(step, (prompt[:, 0], caches), jnp.arange(given + steps - 1))
    return tokens.T[:, given - 1 :]
