"""The models of ``models.py`` in PyTorch, adapted by PEFT: Llama, BERT and ViT as transformers has them, the other two written here.

Imported only where torch, peft and transformers are installed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.models import Model
from benchmarks.ways import ALPHA, FLOORS, RANK


class Attention(nn.Module):
    def __init__(self, width, count):
        super().__init__()
        self.count = count
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (self.count, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width, count):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, count)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Transformer(nn.Module):
    def __init__(self, blocks, width, count, vocab):
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, count) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Residual(nn.Module):
    def __init__(self, inside, width, stride):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, inside), nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(inside, width, 3, stride, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(inside, width, 1, stride, bias=False) if inside != width else None

    def forward(self, x):
        h = F.relu(self.norm1(x))
        y = self.conv2(F.relu(self.norm2(self.conv1(h))))
        return y + (x if self.skip is None else self.skip(h))


class ConvNet(nn.Module):
    def __init__(self, widths, depth, classes):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        blocks, inside = [], widths[0]
        for i, width in enumerate(widths):
            for j in range(depth):
                blocks.append(Residual(inside, width, 2 if i and not j else 1))
                inside = width
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.head = nn.GroupNorm(8, widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, x):
        return self.head(F.relu(self.norm(self.blocks(self.stem(x)))).mean((2, 3)))


class Floor(nn.Module):
    """A frozen model whose first activations alone have a gradient: a number is added to them, and nothing else is trained."""

    def __init__(self, module):
        super().__init__()
        self.module = module.requires_grad_(False)
        self.shift = nn.Parameter(torch.zeros(()))
        first = next(m for m in module.modules() if isinstance(m, nn.Embedding | nn.Conv2d))
        first.register_forward_hook(lambda _module, _inputs, outputs: outputs + self.shift)

    def forward(self, x):
        return self.module(x)


class Logits(nn.Module):
    """A model of transformers, which returns a record, as a function to logits."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


def build(model: Model) -> tuple[nn.Module, str]:
    """The module of a model, and the pattern of the layers that PEFT adapts."""
    sizes = {name: layer.sizes for name, layer in model.layers.items()}
    blocks = sum(name.startswith("down_") for name in sizes)
    if model.name == "transformer":
        (vocab, width), count = sizes["embed"], model.heads
        return Transformer(blocks, width, count, vocab), r".*\.(q|k|v|o|up|down)|head"
    if model.name == "conv net":
        widths = [s[2] for name, s in sizes.items() if name.startswith("conv2_") and name.endswith("_0")]
        depth = sum(name.startswith("conv2_0_") for name in sizes)
        return ConvNet(widths, depth, sizes["head"][1]), r".*\.(conv1|conv2|skip)"
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        ViTConfig,
        ViTForImageClassification,
    )

    shape = {"num_hidden_layers": blocks, "num_attention_heads": model.heads, "attn_implementation": "sdpa"}
    if model.name == "Llama":
        (vocab, width), (_, keys, _), (_, hidden, _) = sizes["embed"], sizes["k_0"], sizes["up_0"]
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=width,
            intermediate_size=hidden,
            num_key_value_heads=keys * model.heads // width,
            tie_word_embeddings=True,
            use_cache=False,
            **shape,
        )
        return Logits(LlamaForCausalLM(config)), r".*\.\w+_proj"
    if model.name == "BERT":
        (vocab, width), (_, hidden, _) = sizes["words"], sizes["up_0"]
        none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = BertConfig(vocab_size=vocab, hidden_size=width, intermediate_size=hidden, **none, **shape)
        return Logits(BertForSequenceClassification(config)), r".*encoder.*\.(query|key|value|dense)"
    (_, width, _), side = sizes["patches"], round((sizes["positions"][1] - 1) ** 0.5) * 16
    config = ViTConfig(
        hidden_size=width,
        intermediate_size=sizes["up_0"][1],
        image_size=side,
        num_labels=sizes["head"][1],
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **shape,
    )
    return Logits(ViTForImageClassification(config)), r".*encoder.*\.(query|key|value|dense)"


def ways(model: Model, x: np.ndarray, labels: np.ndarray) -> dict[str, tuple[Callable[[], Any], dict[str, int]]]:
    """A training step of each way, forward, backward and Adam, and how many parameters there are and are trained.

    The floors are the gradient alone, as that of JAX is, and nothing of theirs is trained.
    """
    torch.manual_seed(0)
    inputs = torch.tensor(x)
    if inputs.ndim == 4:
        inputs = inputs.permute(0, 3, 1, 2).contiguous()
    wanted = torch.tensor(labels).long()

    def step(module, optimizer=None):
        def run():
            module.zero_grad(set_to_none=True)
            logits = module(inputs)
            F.cross_entropy(logits.reshape(-1, logits.shape[-1]), wanted.reshape(-1)).backward()
            if optimizer is not None:
                optimizer.step()

        return run

    found = {}
    for (name, floor), wrapped in zip(FLOORS.items(), (lambda m: m, torch.compile), strict=True):
        module, targets = build(model)
        size = sum(p.numel() for p in module.parameters())
        adapted = get_peft_model(module, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets)).train()
        trained = [p for p in adapted.parameters() if p.requires_grad]
        sizes = {"parameters": size, "trained": sum(p.numel() for p in trained)}
        found[name] = step(wrapped(adapted), torch.optim.Adam(trained, lr=1e-4)), sizes
        found[floor] = step(wrapped(Floor(build(model)[0]).train())), {"parameters": size, "trained": 0}
    return found
