"""Makes tests/fixtures/peft: small adapters saved by the real PEFT, their bases, and what PyTorch computes with them.

    pip install "torch==2.13.0+cpu" "peft==0.21.2" "transformers>=4.57,<5"
    python tests/make_peft_fixtures.py

Each folder holds what ``PeftModel.save_pretrained`` wrote, ``base.safetensors`` (the base's weights in bf16-exact fp32) and
``expected.safetensors`` (inputs, the base's outputs, the adapted outputs).
"""

import shutil
import sys
import warnings
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

FOLDER = Path(__file__).parent / "fixtures" / "peft"
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2], [6, 5, 3, 5, 8, 9, 7]])


def llama(**options):
    sizes = {
        "vocab_size": 23,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, head_dim=6, max_position_embeddings=16, **options)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    sizes = {"vocab_size": 23, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 16}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    )


def bert():
    sizes = {
        "vocab_size": 23,
        "hidden_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "intermediate_size": 20,
    }
    config = transformers.BertConfig(**sizes, max_position_embeddings=16, num_labels=3)
    return transformers.BertForSequenceClassification(config)


class Vision(nn.Module):
    """Convolutions over lines and planes; the last is 1x1."""

    def __init__(self):
        super().__init__()
        self.plane, self.point, self.line = nn.Conv2d(3, 8, (2, 3)), nn.Conv2d(8, 5, 1), nn.Conv1d(5, 7, 3, stride=2)
        self.head = nn.Linear(7, 4)

    def forward(self, x):
        x = self.point(torch.tanh(self.plane(x))).mean(2)
        return self.head(torch.tanh(self.line(x)).mean(2))


class Experts(nn.Module):
    """Two weights of all experts in one module, (experts, out, in); every token goes through all."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 4) / 2)
        self.down = nn.Parameter(torch.randn(3, 4, 6) / 2)

    def forward(self, x):
        return torch.einsum("eth,edh->td", torch.tanh(torch.einsum("td,ehd->eth", x, self.up)), self.down)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts, self.head = Experts(), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.experts(x))


class Routed(nn.Module):
    """Experts, their router, a bias and a layer in a layer, all in one module."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 4) / 2)
        self.down = nn.Parameter(torch.randn(3, 4, 6) / 2)
        self.bias = nn.Parameter(torch.randn(4) / 2)
        self.gate, self.tail = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 4))

    def forward(self, x):
        y = torch.einsum("eth,edh->etd", torch.tanh(torch.einsum("td,ehd->eth", x, self.up)), self.down)
        return self.tail(torch.einsum("etd,te->td", y, self.gate(x).softmax(-1)) + self.bias)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.moe, self.head = Routed(), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.moe(x))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(12, 3, batch_first=True), nn.Linear(12, 5)

    def forward(self, x):
        return self.head(self.attn(x, x, x)[0])


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "llama": (llama, IDS, {"r": 2, "lora_alpha": 6, "target_modules": LINEAR}),
    "llama_rslora_patterns": (
        llama,
        IDS,
        {
            "r": 4,
            "lora_alpha": 3,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 2, "^model.layers.1.mlp.down_proj": 3},
            "alpha_pattern": {r"layers.0.self_attn.q_proj": 7},
        },
    ),
    "llama_embedding": (llama, IDS, {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "llama_tied": (
        lambda: llama(tie_word_embeddings=True),
        IDS,
        {"r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens", "v_proj"], "ensure_weight_tying": True},
    ),
    "llama_head": (
        lambda: llama(tie_word_embeddings=True),
        IDS,
        {"r": 2, "lora_alpha": 4, "target_modules": ["lm_head", "v_proj"]},
    ),
    "llama_tokens": (
        lambda: llama(tie_word_embeddings=True),
        IDS,
        {"r": 2, "lora_alpha": 4, "target_modules": ["v_proj"], "trainable_token_indices": [1, 9]},
    ),
    "gpt2": (
        gpt2,
        IDS,
        {"r": 2, "lora_alpha": 5, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    ),
    "gpt2_table": (gpt2, IDS, {"r": 2, "lora_alpha": 5, "target_modules": ["wte"]}),
    "gpt2_bias": (
        gpt2,
        IDS,
        {
            "r": 2,
            "lora_alpha": 5,
            "target_modules": ["c_attn"],
            "bias": "all",
            "lora_bias": True,
            "fan_in_fan_out": True,
        },
    ),
    "bert": (
        bert,
        IDS,
        {"r": 2, "lora_alpha": 5, "target_modules": ["query", "value", "dense"], "modules_to_save": ["classifier"]},
    ),
    "vision": (
        Vision,
        torch.linspace(-2, 2, 2 * 3 * 6 * 9).reshape(2, 3, 6, 9),
        {"r": 2, "lora_alpha": 5, "target_modules": ["plane", "point", "line"]},
    ),
    "experts": (
        Mixture,
        torch.linspace(-2, 2, 28).reshape(7, 4),
        {"r": 2, "lora_alpha": 5, "target_modules": ["head"], "target_parameters": ["experts.up", "experts.down"]},
    ),
    "nested": (
        Nested,
        torch.linspace(-2, 2, 28).reshape(7, 4),
        {
            "r": 2,
            "lora_alpha": 5,
            "target_modules": ["gate", "head"],
            "target_parameters": ["moe.up", "moe.down"],
            "modules_to_save": ["tail.0"],
            "bias": "lora_only",
        },
    ),
    "attention": (
        Attention,
        torch.linspace(-2, 2, 120).reshape(2, 5, 12).sin(),
        {"r": 2, "lora_alpha": 5, "target_modules": ["attn", "head"]},
    ),
    "dora": (llama, IDS, {"r": 2, "target_modules": ["q_proj"], "use_dora": True}),
    "pissa": (llama, IDS, {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": "pissa"}),
}


def outputs(model, x):
    out = model(x)
    return getattr(out, "logits", out)


def trained(model, x):
    """A few large steps, so that everything that trains moves."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, 0.05)
    for step in range(6):
        optimizer.zero_grad()
        wanted = torch.roll(torch.arange(outputs(model, x).numel()), step).reshape_as(outputs(model, x)) % 5
        (outputs(model, x) - wanted / 3).square().mean().backward()
        optimizer.step()


def make(name, folder):
    build, x, options = CASES[name]
    torch.manual_seed(0)
    base = build().eval()
    with torch.no_grad():
        before = outputs(base, x)
    weights = {k: v.clone().contiguous() for k, v in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(**options)).eval()
    trained(model, x)
    with torch.no_grad():
        after = outputs(model, x)
    shutil.rmtree(folder / name, ignore_errors=True)
    model.save_pretrained(folder / name)
    (folder / name / "README.md").unlink(missing_ok=True)
    if options.get("use_dora") or "init_lora_weights" in options:
        return  # refused before the base matters
    if base_is_tied(weights):
        weights.pop("lm_head.weight")
    save_file(weights, folder / name / "base.safetensors")
    save_file({"x": x, "before": before, "after": after.contiguous()}, folder / name / "expected.safetensors")
    print(f"{name}: outputs moved by {(after - before).abs().max():.2f}")


def base_is_tied(weights):
    table = weights.get("model.embed_tokens.weight", weights.get("transformer.wte.weight"))
    return table is not None and "lm_head.weight" in weights and torch.equal(table, weights["lm_head.weight"])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in sys.argv[1:] or CASES:
        make(name, FOLDER)
