"""A trained adapter to PEFT and back, and merged into a model that Hugging Face's libraries load: SmolLM2-135M, on a CPU.

    pip install -e ".[demo]"
    python examples/exchange.py            # SmolLM2-135M-Instruct
    python examples/exchange.py --quick    # a tiny model, in seconds

Every way is checked by its logits. Where torch, transformers and peft are installed they are asked too: they load what was written
here, and this loads what PEFT writes.
"""

import argparse
import importlib.util

import assets
import jax
import jax.numpy as jnp
import llama
import numpy as np
import optax
from rich.table import Table
from training import console, fit, main, progress, shuffled, write_json

import jlora
import jlora.export
import jlora.peft
from jlora.peft import Weight

LENGTH, BATCH, STEPS, TOLERANCE = 64, 4, 20, 1e-3


def names(config: llama.Config) -> dict:
    """Where each leaf is found in ``transformers``' Llama."""
    pairs = config.rope_pairs  # side by side here, halves there
    layer, block = r"model.layers.\1", r"params/blocks_(\d+)"
    return {
        f"{block}/attention/query/kernel": Weight(f"{layer}.self_attn.q_proj.weight", rotary_heads=config.heads if pairs else None),
        f"{block}/attention/key/kernel": Weight(f"{layer}.self_attn.k_proj.weight", rotary_heads=config.kv_heads if pairs else None),
        f"{block}/attention/value/kernel": f"{layer}.self_attn.v_proj.weight",
        f"{block}/attention/out/kernel": f"{layer}.self_attn.o_proj.weight",
        rf"{block}/mlp/(gate|up|down)/kernel": rf"{layer}.mlp.\2_proj.weight",
        f"{block}/attention_norm/scale": f"{layer}.input_layernorm.weight",
        f"{block}/mlp_norm/scale": f"{layer}.post_attention_layernorm.weight",
        "params/norm/scale": "model.norm.weight",
        "params/embed/embedding": ("model.embed_tokens.weight", "lm_head.weight"),
    }  # fmt: skip


def hub_config(config: llama.Config) -> dict:
    """The ``config.json`` of the same model in ``transformers``."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_length,
        "rope_theta": config.theta,
        "rms_norm_eps": config.eps,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    }


def adapter(model, params, sites, tokens: np.ndarray, seed: int):
    """An adapter after a few steps on Hamlet."""
    lora = jlora.init(jax.random.key(seed), params, sites, jlora.LoRA(rank=8, alpha=16))
    apply = jlora.wrap(model.apply)
    rows = tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)

    def loss(lora, params, batch, key):
        logits = apply(params, lora, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    batches = (rows[picks] for picks in shuffled(len(rows), BATCH, seed))
    found = fit("LoRA", loss, lora, params, batches, STEPS, optax.adam(2e-3))
    console.print(f"Trained {STEPS} steps: loss {found.losses[0]:.2f} -> {found.losses[-1]:.2f}.")
    return found.tree


class Checks:
    """Ways that have to give the same logits."""

    def __init__(self, wanted):
        self.wanted, self.rows = np.asarray(wanted), {}

    def add(self, what: str, logits) -> None:
        """Compares one way with the adapter as it was trained."""
        self.rows[what] = float(np.abs(np.asarray(logits) - self.wanted).max())

    def show(self) -> None:
        """Prints the table; raises if one is off."""
        table = Table("the adapter ...", f"logits (up to {np.abs(self.wanted).max():.0f}) differ by at most")
        for what, error in self.rows.items():
            table.add_row(what, f"{error:.1e}")
        console.print(table)
        off = [what for what, error in self.rows.items() if not error <= TOLERANCE]
        if off:
            raise RuntimeError(f"Logits differ: {'; '.join(off)}.")


def ask_torch(args, checks: Checks, x, load_here) -> None:
    """The real libraries: they load what was written here, and what they write is loaded here."""
    import peft
    import torch
    import transformers

    def logits(model) -> np.ndarray:
        with torch.no_grad():
            return model.eval()(torch.as_tensor(np.array(x))).logits.numpy()

    def base():
        return transformers.AutoModelForCausalLM.from_pretrained(args.out / "base")

    checks.add(
        "merged and exported, in transformers",
        logits(transformers.AutoModelForCausalLM.from_pretrained(args.out / "merged")),
    )
    theirs = peft.PeftModel.from_pretrained(base(), args.out / "peft")
    checks.add("saved for PEFT, in PEFT", logits(theirs))
    theirs.save_pretrained(args.out / "from_peft")
    checks.add("saved by PEFT, here", load_here(args.out / "from_peft"))


def run(args: argparse.Namespace) -> None:
    """The whole way."""
    model, params, tokenizer = assets.load_glassllm() if args.quick else assets.load_smollm2()
    tokens = np.asarray(tokenizer.encode(assets.hamlet()).ids, np.int32)
    x = jnp.asarray(tokens[:LENGTH][None])
    sites, table = jlora.sites(model.apply, params, x), names(model.config)
    lora = adapter(model, params, sites, tokens, args.seed)
    apply = jax.jit(jlora.wrap(model.apply))
    checks = Checks(apply(params, lora, x))

    jlora.peft.save(args.out / "peft", lora, names=table, task_type="CAUSAL_LM", overwrite=True)

    def load_here(folder):
        return apply(params, jlora.peft.load(folder, sites, names=table), x)

    checks.add("saved for PEFT, loaded again", load_here(args.out / "peft"))
    write = {
        "sites": sites,
        "names": table,
        "config": hub_config(model.config),
        "shard_bytes": 200_000_000,
        "overwrite": True,
    }
    with progress() as bar:
        for name, adapters in {"base": None, "merged": lora}.items():
            task = bar.add_task(f"Exporting {name}", total=None, loss="")
            jlora.export.save(
                args.out / name,
                params,
                adapters,
                **write,
                progress=lambda _, done, total, task=task: bar.update(task, completed=done, total=total),
            )
    back = jlora.export.load(args.out / "merged", params, sites=sites, names=table)
    checks.add("merged, exported as safetensors, loaded again", jax.jit(model.apply)(back, x))
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers", "peft")):
        ask_torch(args, checks, x, load_here)
    else:
        console.print(
            'torch, transformers and peft (pip install "jlora[interop]") are not installed: they are not asked.'
        )
    checks.show()
    prompt = jnp.asarray([tokenizer.encode("HAMLET" if args.quick else assets.chat("What is thy name?")).ids])
    said = {}
    for who, weights in {"The base": params, "Merged and exported": back}.items():
        said[who] = tokenizer.decode(np.asarray(llama.greedy(model, weights, prompt, 48)[0]).tolist()).strip()
        console.print(f"[bold]{who}:[/]", end=" ")
        console.print(said[who], markup=False)
    write_json(args.out / "results.json", {"differences": checks.rows, "said": said, "steps": STEPS})
    console.print(f"Written to {args.out}: peft/, merged/, base/, results.json")


if __name__ == "__main__":
    main(run, __doc__, __file__)
