#!/usr/bin/env python3
"""Work lm-eval's numbers out once more, from the server's log-probabilities alone, and compare.

    python check_results.py http://127.0.0.1:8000 OUTPUT_PATH_OF_LM_EVAL

Nothing of lm-eval is used: the text is turned into tokens by the server, the log-probabilities come from one
request an item (lm-eval sends several at once), and the metrics are those formulas:

    acc, acc_norm   share of items whose true line has the greatest log-probability, as it is or per character
    perplexity      exp of minus the sum of log-probabilities per word or byte; the first token follows the
                    token that begins a text, as in lm-eval's rolling windows (a passage fits one window)
"""

import json
import math
import pathlib
import re
import sys
import urllib.request

HERE = pathlib.Path(__file__).resolve().parent
# The same tokens in another batch: the server promises the same bits. Sums differ in their order only.
TOLERANCE = 1e-9


def post(url, path, body):
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def tokens_of(url, text, special=False):
    return post(url, "/tokenize", {"prompt": text, "add_special_tokens": special})["tokens"]


def logprob(url, tokens, given):
    """Of all tokens after the first `given`."""
    body = {"prompt": tokens, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    logprobs = post(url, "/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
    assert len(logprobs) == len(tokens) + 1
    return sum(logprobs[given : len(tokens)])


def next_line(url):
    right = right_norm = count = 0
    for line in (HERE / "volley_next_line.jsonl").read_text().splitlines():
        item = json.loads(line)
        given = len(tokens_of(url, item["context"]))
        scores = [logprob(url, tokens_of(url, f"{item['context']}\n{choice}"), given) for choice in item["choices"]]
        per_character = [score / len(choice) for score, choice in zip(scores, item["choices"])]
        right += scores.index(max(scores)) == item["answer"]
        right_norm += per_character.index(max(per_character)) == item["answer"]
        count += 1
    return {"acc": right / count, "acc_norm": right_norm / count}


def held_out(url):
    begin = json.loads((HERE.parents[2] / "models/demo/tokenizer.json").read_text())
    config = json.loads((HERE.parents[2] / "models/demo/tokenizer_config.json").read_text())
    name = config.get("bos_token") or config["eos_token"]
    prefix = next(token["id"] for token in begin["added_tokens"] if token["content"] == name)
    total = words = size = 0
    for line in (HERE / "volley_held_out.jsonl").read_text().splitlines():
        text = json.loads(line)["text"]
        total += logprob(url, [prefix, *tokens_of(url, text)], 1)
        words += len(re.split(r"\s+", text))
        size += len(text.encode())
    return {
        "word_perplexity": math.exp(-total / words),
        "byte_perplexity": math.exp(-total / size),
        "bits_per_byte": -total / size / math.log(2),
    }


def main():
    url, output = sys.argv[1].rstrip("/").removesuffix("/v1"), pathlib.Path(sys.argv[2])
    (path,) = output.rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    failed = 0
    for task, expected in {"volley_next_line": next_line(url), "volley_held_out": held_out(url)}.items():
        for metric, value in expected.items():
            given = results[task][f"{metric},none"]
            same = isinstance(given, (int, float)) and math.isfinite(given) and math.isclose(given, value, rel_tol=TOLERANCE)
            failed += not same
            print(f"{'ok' if same else 'FAILED'}: lm-eval, {task}: {metric} {given}, worked out {value}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
