"""PEFT + torch on one GPU: the step that ``benchmarks.gpu`` compares with."""

import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_ways import ALPHA, CASES, COMPILED, RANK, WARM_UP, Case, kernels


def measure_torch(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same step in PEFT + torch: frozen base in bf16, factors in fp32, products in bf16 by autocast, as Trainer(bf16=True) does."""
    del folder
    import peft
    import torch
    import transformers

    case, device = CASES[job["case"]], job["device"]
    if device == "cuda" and not torch.cuda.is_available():
        return {"failed": "torch sees no GPU"}
    s, dtype = case.shape, getattr(torch, job["dtype"])
    config = transformers.LlamaConfig(
        vocab_size=s.vocab,
        hidden_size=s.width,
        intermediate_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.head_dim,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    targets = [f"{name}_proj" for name in kernels(s)]
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            base_model = transformers.LlamaForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lora = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        net = peft.get_peft_model(base_model, lora).train()
        return _torch_steps(net, base_model, case, job)
    except torch.OutOfMemoryError as error:
        return {"does not fit": f"ran out of memory: {str(error).splitlines()[0]}"}


def _torch_steps(net: Any, base_model: Any, case: Case, job: dict[str, Any]) -> dict[str, Any]:
    import torch

    device = job["device"]
    cuda = device == "cuda"
    trained = [p for p in net.parameters() if p.requires_grad]
    tokens = torch.randint(case.shape.vocab, (case.batch, case.length + 1), device=device)
    inputs, labels = tokens[:, :-1], tokens[:, 1:].reshape(-1)
    adam = torch.optim.Adam(trained, lr=1e-4, fused=cuda)

    def loss(logits: Any) -> Any:
        return torch.nn.functional.cross_entropy(logits.float().reshape(-1, case.shape.vocab), labels)

    if job["way"] == COMPILED:  # block by block, as torch advises for blocks that repeat: compiled once for all
        # Should torch compile one for each block all the same, it is not to fall back to eager after a few.
        torch._dynamo.config.recompile_limit = 4 * case.shape.layers
        for layer in base_model.model.layers:
            layer.compile(backend=job["backend"])
        loss = torch.compile(loss, backend=job["backend"])

    def advance() -> float:
        adam.zero_grad(set_to_none=True)
        with torch.autocast(device, getattr(torch, job["dtype"])):
            value = loss(net(input_ids=inputs).logits)
        value.backward()
        adam.step()
        if cuda:
            torch.cuda.synchronize()
        return float(value.detach())

    losses, samples = [advance() for _ in range(WARM_UP)], []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(job["steps"]):
        start = time.perf_counter()
        losses.append(advance())
        samples.append(time.perf_counter() - start)
    compiled = {}
    if job["way"] == COMPILED:
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        compiled = {"backend": job["backend"], "graphs": graphs}
    return compiled | {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {"torch": torch.__version__},
        "trained": sum(p.numel() for p in trained),
        "dtypes trained": sorted({str(p.dtype) for p in trained}),
        "step": samples,
        "losses": losses,
        "peak": torch.cuda.max_memory_allocated() if cuda else None,
    }
