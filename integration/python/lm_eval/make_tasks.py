#!/usr/bin/env python3
"""Make the documents of the two local lm-eval tasks from the demo model's corpus.

volley_next_line.jsonl: which of four lines follows eight lines of a play.
volley_held_out.jsonl: passages to measure perplexity on.
Both come from the last 5 % of the text, which the demo model was not trained on.

    python make_tasks.py
"""

import json
import pathlib
import random

HERE = pathlib.Path(__file__).resolve().parent
CORPUS = HERE.parents[2] / "models/demo/shakespeare.txt"
ITEMS, CONTEXT, CHOICES = 40, 8, 4
PASSAGES, PASSAGE_BYTES = 8, 2000  # below 1,024 tokens of the demo tokenizer, with room to spare


def held_out():
    """As train.py cuts it."""
    text = CORPUS.read_text()
    return text[text.index("\n\n", int(len(text) * 0.95)) + 2:]


def next_line(text, rng):
    """The wrong choices are the true line with two neighbouring words swapped: as long, made of the
    same words, and wrong for a model that knows how people speak. (With other lines as wrong
    choices a model of this size does no better than chance.)"""
    lines = text.split("\n")
    items = [i for i in range(CONTEXT, len(lines)) if len(lines[i].split()) >= 7 and lines[i - 1]]
    for at in sorted(rng.sample(items, ITEMS)):
        words, choices = lines[at].split(), [lines[at]]
        while len(choices) < CHOICES:
            i = rng.randrange(len(words) - 1)
            other = " ".join([*words[:i], words[i + 1], words[i], *words[i + 2 :]])
            if other not in choices:
                choices.append(other)
        rng.shuffle(choices)
        yield {"context": "\n".join(lines[at - CONTEXT : at]), "choices": choices,
               "answer": choices.index(lines[at])}


def passages(text):
    at = 0
    for _ in range(PASSAGES):
        end = text.index("\n\n", at + PASSAGE_BYTES)
        yield {"text": text[at:end]}
        at = end + 2


def main():
    text = held_out()
    for name, docs in {"next_line": next_line(text, random.Random(1)), "held_out": passages(text)}.items():
        path = HERE / f"volley_{name}.jsonl"
        path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
