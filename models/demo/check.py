#!/usr/bin/env python3
"""Check the demo model with HF transformers: nothing missing, the same held-out loss as train.py
reports, and samples to read.

    OMP_NUM_THREADS=1 python check.py [DIR]
"""

import pathlib
import sys

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

import train

COMPLETIONS = ["ROMEO:\n", "First Citizen:\n", "KING RICHARD III:\nNow is the"]
CHATS = [
    [{"role": "user", "content": "What light through yonder window breaks?"}],
    [{"role": "user", "content": "KATHARINA:\nWhere is my lord?"}],
    [{"role": "system", "content": "You are a helpful assistant."},
     {"role": "user", "content": "Hello! Who are you?"}],
]


def held_out_loss(model, ids):
    """Mean nats per token over the windows that train.py evaluates."""
    x, y = train.windows(ids)
    total = sum(
        F.cross_entropy(model(a, use_cache=False).logits.flatten(0, 1), b.flatten(), reduction="sum").item()
        for a, b in zip(x.split(8), y.split(8)))
    return total / y.numel()


@torch.no_grad()
def main():
    torch.set_num_threads(1)
    d = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent)
    tok = AutoTokenizer.from_pretrained(d)
    model, info = AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32, output_loading_info=True)
    bad = {k: v for k, v in info.items() if v}
    assert not bad, f"load problems {bad}"
    model.eval()

    _, held_text = train.split_corpus()
    ids = tok(held_text, add_special_tokens=False).input_ids
    assert ids == train.Tokenizer.from_file(str(d / "tokenizer.json")).encode(held_text).ids
    loss = held_out_loss(model, ids)
    print(f"held-out loss by transformers: {loss:.5f} nats a token, "
          f"{loss * len(ids) / len(held_text.encode()):.5f} a byte")

    torch.manual_seed(1)
    prompts = [tok(text, return_tensors="pt").input_ids for text in COMPLETIONS]
    prompts += [
        tok.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True).input_ids
        for chat in CHATS]
    for prompt in prompts:  # sampling settings come from generation_config.json
        out = model.generate(prompt, max_new_tokens=160, pad_token_id=0)[0]
        print("-" * 60)
        print(tok.decode(out, skip_special_tokens=False))


if __name__ == "__main__":
    main()
