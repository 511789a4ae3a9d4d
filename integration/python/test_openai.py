#!/usr/bin/env python3
"""Drive a running server with the `openai` package, as its users do.

The base URL comes from VOLLEY_URL (`http://127.0.0.1:8000`, with or without `/v1`), the key, if the
server wants one, from VOLLEY_API_KEY. Any model will do: nothing here depends on what it says. Run it
with pytest, or as it is:

    VOLLEY_URL=http://127.0.0.1:8000 python test_openai.py
"""

import json
import os
import sys
import urllib.request

import openai
from openai import OpenAI

URL = os.environ.get("VOLLEY_URL", "http://127.0.0.1:8000").rstrip("/").removesuffix("/v1")
KEY = os.environ.get("VOLLEY_API_KEY", "none")
client = OpenAI(base_url=f"{URL}/v1", api_key=KEY, max_retries=0, timeout=120)

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Speak, speak."}]
# So that answers have the length they are asked for.
ON = {"ignore_eos": True}


def model():
    return client.models.list().data[0].id


def chat(**more):
    extra = {**ON, **more.pop("extra_body", {})}
    arguments = {"model": model(), "messages": MESSAGES, "max_tokens": 12, "extra_body": extra, **more}
    return client.chat.completions.create(**arguments)


def complete(**more):
    extra = {**ON, **more.pop("extra_body", {})}
    arguments = {"model": model(), "prompt": "ROMEO:\n", "max_tokens": 12, "extra_body": extra, **more}
    return client.completions.create(**arguments)


def post(path, body):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    request = urllib.request.Request(URL + path, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


def refused(kind, call, param=None, code=None):
    """The error of a call that has to fail."""
    try:
        call()
    except kind as error:
        body = error.body
        assert body["message"] and body["type"], body
        assert param is None or body["param"] == param, body
        assert code is None or body["code"] == code, body
        return error
    raise AssertionError(f"{kind.__name__} was expected")


def test_models():
    listed = client.models.list().data
    assert len(listed) == 1 and listed[0].object == "model"
    one = client.models.retrieve(listed[0].id)
    assert one.id == listed[0].id and one.max_model_len > 0


def test_chat():
    answer = chat(temperature=0)
    assert answer.object == "chat.completion" and answer.model == model()
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    again = chat(temperature=0, max_tokens=openai.NOT_GIVEN, max_completion_tokens=12)
    assert again.choices[0].message.content == choice.message.content


def test_chat_stream():
    whole = chat(temperature=0)
    chunks = list(chat(temperature=0, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert not chunks[-1].choices and chunks[-1].usage == whole.usage
    assert all(c.usage is None for c in chunks[:-1])
    assert len({c.id for c in chunks}) == 1


def test_chat_stream_of_several():
    whole = chat(n=3, seed=5, temperature=1.2)
    texts = ["", "", ""]
    for chunk in chat(n=3, seed=5, temperature=1.2, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_seeds():
    def ids(**more):
        answer = complete(temperature=1.0, max_tokens=24, extra_body={"return_token_ids": True}, **more)
        return [choice.token_ids for choice in answer.choices]

    three = ids(seed=11, n=3)
    assert three == ids(seed=11, n=3)
    assert ids(seed=13) == [three[2]]
    assert three[0] != three[1]
    assert ids() != ids(), "without a seed, answers differ"


def test_completion_stream():
    whole = complete(temperature=0)
    assert whole.object == "text_completion" and whole.choices[0].finish_reason == "length"
    chunks = list(complete(temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_prompts_in_all_forms():
    ids = post("/tokenize", {"model": model(), "prompt": "ROMEO:\n"})["tokens"]
    text = complete(temperature=0).choices[0].text
    assert complete(temperature=0, prompt=ids).choices[0].text == text
    for prompts in (["ROMEO:\n", "JULIET:\n"], [ids, ids[:1]]):
        answer = complete(temperature=0, prompt=prompts, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.choices[0].text == answer.choices[1].text == text
        assert answer.usage.completion_tokens == 4 * 12
    assert post("/detokenize", {"tokens": ids})["prompt"].endswith("ROMEO:\n")


def test_token_ids():
    answer = complete(temperature=0, extra_body={"return_token_ids": True})
    (choice,) = answer.choices
    assert len(choice.token_ids) == 12
    assert len(choice.prompt_token_ids) == answer.usage.prompt_tokens
    said = chat(temperature=0, extra_body={"return_token_ids": True})
    assert len(said.choices[0].token_ids) == 12
    assert len(said.prompt_token_ids) == said.usage.prompt_tokens
    streamed = complete(temperature=0, stream=True, extra_body={"return_token_ids": True})
    assert sum((c.choices[0].token_ids or [] for c in streamed if hasattr(c.choices[0], "token_ids")), []) == choice.token_ids


def test_stop():
    text = complete(temperature=0, max_tokens=32).choices[0].text
    for stop in (text[3:5], text[7:8], text[-4:-1]):
        if not stop or "\ufffd" in stop:
            continue
        answer = complete(temperature=0, max_tokens=32, stop=["\x00never", stop])
        assert answer.choices[0].text == text[: text.index(stop)]
        assert answer.choices[0].finish_reason == "stop"
        chunks = list(complete(temperature=0, max_tokens=32, stop=stop, stream=True))
        assert "".join(c.choices[0].text for c in chunks) == text[: text.index(stop)]


def test_chat_logprobs():
    answer = chat(temperature=0, logprobs=True, top_logprobs=4)
    content = answer.choices[0].logprobs.content
    assert len(content) == 12
    for token in content:
        assert token.logprob <= 0 and len(token.top_logprobs) == 4
        assert token.logprob == max(t.logprob for t in token.top_logprobs), "greedy takes the best"
        assert bytes(token.bytes).decode("utf-8", "replace") == token.token
    streamed = chat(temperature=0, logprobs=True, top_logprobs=4, stream=True)
    parts = [c.choices[0].logprobs.content for c in streamed if c.choices[0].logprobs]
    assert sum(parts, []) == content
    assert chat(temperature=0).choices[0].logprobs is None


def test_echo_with_logprobs():
    """As lm-eval's local-completions asks for loglikelihoods."""
    ids = post("/tokenize", {"prompt": "First Citizen:\nBefore we proceed any further"})["tokens"]
    answer = complete(prompt=[ids], max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234)
    lists = answer.choices[0].logprobs
    assert len(lists.tokens) == len(lists.token_logprobs) == len(lists.top_logprobs) == len(lists.text_offset) == len(ids) + 1
    assert lists.token_logprobs[0] is None and lists.top_logprobs[0] is None
    for token, logprob, top in list(zip(lists.tokens, lists.token_logprobs, lists.top_logprobs))[1:]:
        assert top[token] == logprob <= 0 and 1 <= len(top) <= 2
    assert lists.text_offset == sorted(lists.text_offset)
    # The prompt alone says the same of its tokens.
    alone = complete(prompt=ids, max_tokens=0, logprobs=1, echo=True)
    assert alone.choices[0].logprobs.token_logprobs == lists.token_logprobs[:-1]
    assert alone.usage.completion_tokens == 0 and alone.choices[0].finish_reason == "length"
    # A token generated has the logprob it has as part of a prompt.
    longer = complete(prompt="ROMEO:\n", temperature=0, logprobs=0, echo=True, extra_body={"return_token_ids": True})
    (choice,) = longer.choices
    again = complete(prompt=choice.prompt_token_ids + choice.token_ids, max_tokens=0, logprobs=0, echo=True)
    assert again.choices[0].logprobs.token_logprobs == choice.logprobs.token_logprobs


def test_echo_returns_the_prompt():
    answer = complete(temperature=0, echo=True)
    assert answer.choices[0].text == "ROMEO:\n" + complete(temperature=0).choices[0].text


def test_penalties_and_bias_change_the_answer():
    answer = complete(max_tokens=8, logit_bias={"40": 100}, extra_body={"return_token_ids": True})
    assert answer.choices[0].token_ids == [40] * 8
    plain, penalised = (
        complete(temperature=0, max_tokens=64, extra_body={"return_token_ids": True}, **more).choices[0].token_ids
        for more in ({}, {"frequency_penalty": 2.0, "presence_penalty": 2.0})
    )
    assert len(set(penalised)) >= len(set(plain))


def test_errors():
    length = client.models.list().data[0].max_model_len
    refused(openai.NotFoundError, lambda: complete(model="no-such-model"), "model", "model_not_found")
    refused(openai.NotFoundError, lambda: chat(model="no-such-model"), "model", "model_not_found")
    refused(openai.NotFoundError, lambda: client.models.retrieve("no-such-model"))
    refused(openai.NotFoundError, lambda: client.embeddings.create(model=model(), input="a"))
    for call in (
        lambda: complete(max_tokens=length),
        lambda: chat(max_tokens=length),
        lambda: complete(prompt="word " * (length + 10), max_tokens=1),
        lambda: complete(max_tokens=10**18),
    ):
        refused(openai.BadRequestError, call, code="context_length_exceeded")
    for name, value in (("temperature", -1), ("top_p", 2), ("n", 0), ("max_tokens", "5"), ("stop", [""]), ("seed", "x")):
        refused(openai.BadRequestError, lambda: complete(**{name: value}), name)
        refused(openai.BadRequestError, lambda: chat(**{name: value}), name)
    refused(openai.BadRequestError, lambda: chat(messages=[]), "messages")
    refused(openai.BadRequestError, lambda: complete(prompt=[]), "prompt")
    refused(openai.BadRequestError, lambda: complete(suffix="x"), "suffix")
    refused(openai.BadRequestError, lambda: complete(best_of=3, n=1), "best_of")
    refused(openai.BadRequestError, lambda: complete(stream=True, temperature=-1), "temperature")


def test_a_stream_can_be_left():
    stream = complete(max_tokens=500, stream=True)
    next(iter(stream))
    stream.close()
    assert complete(temperature=0, max_tokens=1).usage.completion_tokens == 1


def main():
    tests = [(name, test) for name, test in globals().items() if name.startswith("test_")]
    for name, test in tests:
        test()
        print(f"{name}: ok", flush=True)
    print(f"{len(tests)} tests passed against {URL}")


if __name__ == "__main__":
    sys.exit(main())
