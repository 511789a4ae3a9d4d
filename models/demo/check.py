#!/usr/bin/env python3
"""Check the demo model with HF transformers (f32): nothing missing, the same held-out loss as
train.py reports, and samples to read.  Writes DIR/golden.json for Volley's tests: greedy
continuations of the prompts below, chats rendered by the chat template, each until an end token
or 48 tokens, with the lead of the best logit at every step.

    OMP_NUM_THREADS=1 python check.py [DIR]
"""

import json
import pathlib
import re
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


def strange_words(model, tok):
    """Share of the words of sampled text that the corpus nowhere has: misspelt or made up."""
    words = lambda text: re.findall(r"[a-z']+", text.lower())
    known = set(words(train.CORPUS.read_text()))
    torch.manual_seed(3)
    prompts = tok(["ROMEO:\n"] * 16, return_tensors="pt").input_ids
    out = model.generate(prompts, max_new_tokens=250, pad_token_id=0)
    said = [w for row in out for w in words(tok.decode(row))[:-1]]  # the last one may be cut
    return sum(w not in known for w in said) / len(said)


def greedy(model, tok, messages, text, prompt):
    """One record of golden.json; a full recompute at every step."""
    seq, gaps, eos = prompt[0].tolist(), [], model.generation_config.eos_token_id
    while len(gaps) < 48 and not (gaps and seq[-1] in eos):
        top = model(torch.tensor([seq]), use_cache=False).logits[0, -1].topk(2)
        gaps.append(round(float(top.values[0] - top.values[1]), 5))
        seq.append(int(top.indices[0]))
    new = seq[prompt.shape[1]:]
    return {"messages": messages, "prompt": text, "prompt_ids": prompt[0].tolist(), "greedy_ids": new,
            "greedy_text": tok.decode(new, skip_special_tokens=True), "top2_gaps": gaps}


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

    print(f"words that the corpus does not have: {100 * strange_words(model, tok):.2f} %")

    texts = [(None, text) for text in COMPLETIONS] + [
        (chat, tok.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)) for chat in CHATS]
    torch.manual_seed(1)
    records = []
    for messages, text in texts:
        prompt = tok(text, add_special_tokens=False, return_tensors="pt").input_ids
        records.append(greedy(model, tok, messages, text, prompt))
        # sampling settings come from generation_config.json
        out = model.generate(prompt, max_new_tokens=160, pad_token_id=0)[0]
        print("-" * 60)
        print(tok.decode(out, skip_special_tokens=False))
    (d / "golden.json").write_text(json.dumps(records, indent=1) + "\n")
    print("-" * 60)
    print("least top-2 logit gap in golden.json:", min(min(r["top2_gaps"]) for r in records))


if __name__ == "__main__":
    main()
