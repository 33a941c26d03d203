"""Makes ``reference.json``: what other implementations say the example models compute.

SmolLM2 goes through transformers (which reads the GGUF file, undoes its permutation and tokenises by itself), glassllm
through its own numpy forward pass. Neither is a dependency; in a scratch environment:

    pip install torch transformers gguf glassllm==0.1.0
    python examples/data/make_reference.py ~/.cache/jlora/smollm2
"""

import json
import re
import sys
from pathlib import Path

import glassllm
import numpy as np
import torch
import transformers

TEXT = "HAMLET\nTo be, or not to be: that is the question:\nWhether 'tis nobler in the mind to suffer 1602 slings"
TOP = 5


def entry(implementation: str, tokens: list[int], logits: np.ndarray) -> dict:
    """Keeps the ``TOP`` largest logits after every token."""
    ids = np.argsort(-logits, axis=-1)[:, :TOP]
    values = np.take_along_axis(logits, ids, axis=-1)
    return {
        "implementation": implementation,
        "tokens": tokens,
        "top_ids": ids.tolist(),
        "top_logits": [[round(float(value), 6) for value in row] for row in values],
    }


def smollm2(folder: str) -> dict:
    """Runs SmolLM2 in fp32 with transformers."""
    file = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **file)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **file)
    tokens = tokenizer.encode(TEXT)
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].numpy()
    return entry(f"transformers {transformers.__version__}, torch {torch.__version__}", tokens, logits)


def toy() -> dict:
    """Runs glassllm with itself."""
    model, tokenizer = glassllm.load_pretrained("en")
    tokens = tokenizer.encode(TEXT)
    return entry(f"glassllm {glassllm.__version__}", tokens, model.forward(tokens).data[0])


def main() -> None:
    """Writes ``reference.json`` beside this file."""
    models = {"glassllm": toy(), "smollm2": smollm2(sys.argv[1])}
    path = Path(__file__).with_name("reference.json")
    text = json.dumps({"text": TEXT, **models}, indent=1)
    # A row of numbers on one line.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda row: "[" + ", ".join(re.findall(r"[-.\w]+", row[0])) + "]", text)
    path.write_text(text + "\n")


if __name__ == "__main__":
    main()
