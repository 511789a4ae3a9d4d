//! `POST /v1/chat/completions`.

use serde_json::{Value, json};

use crate::server::{MODEL, Server};

const PATH: &str = "/v1/chat/completions";

fn body(more: Value) -> Value {
    let mut body = json!({
        "model": MODEL, "messages": [{"role": "user", "content": "Speak, speak."}],
        "max_tokens": 12, "temperature": 0, "ignore_eos": true,
    });
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    body
}

/// The text of one answer of a stream.
fn text(chunks: &[Value], index: u64) -> String {
    let choices = chunks
        .iter()
        .flat_map(|chunk| chunk["choices"].as_array().unwrap());
    choices
        .filter(|choice| choice["index"] == index)
        .filter_map(|choice| choice["delta"]["content"].as_str())
        .collect()
}

#[test]
fn an_answer_has_the_shape_of_openai() {
    let server = Server::start();
    let answer = server.ask(PATH, body(json!({})));
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["model"], MODEL);
    assert!(answer["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 12);
    let total = answer["usage"]["prompt_tokens"].as_u64().unwrap() + 12;
    assert_eq!(answer["usage"]["total_tokens"], total);
    assert!(answer.get("prompt_token_ids").is_none());
}

#[test]
fn a_stream_says_the_same_and_ends_with_the_usage() {
    let server = Server::start();
    let whole = server.ask(PATH, body(json!({})));
    let chunks = server.stream(
        PATH,
        body(json!({"stream": true, "stream_options": {"include_usage": true}})),
    );
    assert_eq!(chunks[0]["object"], "chat.completion.chunk");
    assert_eq!(
        chunks[0]["choices"][0]["delta"],
        json!({"role": "assistant", "content": ""})
    );
    assert_eq!(
        text(&chunks, 0),
        whole["choices"][0]["message"]["content"].as_str().unwrap()
    );
    let [.., finish, usage] = chunks.as_slice() else {
        panic!("{chunks:?}")
    };
    assert_eq!(finish["choices"][0]["finish_reason"], "length");
    assert_eq!(finish["usage"], Value::Null);
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"], whole["usage"]);
    // Every chunk is of the same answer.
    assert!(chunks.iter().all(|chunk| chunk["id"] == chunks[0]["id"]));
}

#[test]
fn seeds_repeat_and_differ_from_answer_to_answer() {
    let server = Server::start();
    let sampled = |more: Value| {
        let mut request =
            body(json!({"temperature": 1.5, "return_token_ids": true, "max_tokens": 24}));
        request
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let answer = server.ask(PATH, request);
        answer["choices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|choice| choice["token_ids"].clone())
            .collect::<Vec<_>>()
    };
    let three = sampled(json!({"seed": 7, "n": 3}));
    assert_eq!(three, sampled(json!({"seed": 7, "n": 3})));
    // Answer i is drawn with seed + i.
    assert_eq!(three[2], sampled(json!({"seed": 9}))[0]);
    assert!(three[0] != three[1] && three[1] != three[2]);
    assert_ne!(sampled(json!({})), sampled(json!({})));
}

#[test]
fn answers_of_a_stream_keep_apart() {
    let server = Server::start();
    let sampled = json!({"temperature": 1.5, "seed": 3, "n": 4});
    let whole = server.ask(PATH, body(sampled.clone()));
    let mut streamed = body(sampled);
    streamed["stream"] = true.into();
    let chunks = server.stream(PATH, streamed);
    for index in 0..4 {
        assert_eq!(
            text(&chunks, index),
            whole["choices"][index as usize]["message"]["content"]
                .as_str()
                .unwrap()
        );
    }
}

#[test]
fn logprobs_are_those_of_the_tokens() {
    let server = Server::start();
    let answer = server.ask(PATH, body(json!({"logprobs": true, "top_logprobs": 3, "return_token_ids": true, "skip_special_tokens": false})));
    let content = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    assert_eq!(content.len(), 12);
    assert_eq!(
        answer["choices"][0]["token_ids"].as_array().unwrap().len(),
        12
    );
    for entry in content {
        // Greedy: the token is the best of its alternatives.
        let top = entry["top_logprobs"].as_array().unwrap();
        assert_eq!(top.len(), 3);
        assert_eq!(
            (&top[0]["token"], &top[0]["logprob"]),
            (&entry["token"], &entry["logprob"])
        );
        let values: Vec<f64> = top.iter().map(|t| t["logprob"].as_f64().unwrap()).collect();
        assert!(
            values.is_sorted_by(|a, b| a >= b) && values[0] <= 0.0,
            "{values:?}"
        );
    }
    let bytes: Vec<u8> = content
        .iter()
        .flat_map(|entry| entry["bytes"].as_array().unwrap())
        .map(|b| b.as_u64().unwrap() as u8)
        .collect();
    assert_eq!(
        String::from_utf8_lossy(&bytes),
        answer["choices"][0]["message"]["content"].as_str().unwrap()
    );
}

#[test]
fn the_template_makes_the_prompt() {
    let server = Server::start();
    let answer = server.ask(
        PATH,
        body(json!({"return_token_ids": true, "max_tokens": 1})),
    );
    let tokens = server.ask(
        "/tokenize",
        json!({"messages": body(json!({}))["messages"]}),
    );
    assert_eq!(answer["prompt_token_ids"], tokens["tokens"]);
    assert_eq!(answer["usage"]["prompt_tokens"], tokens["count"]);
    let text = server.ask("/detokenize", json!({"tokens": tokens["tokens"]}));
    assert_eq!(
        text["prompt"],
        "<|im_start|>user\nSpeak, speak.<|im_end|>\n<|im_start|>assistant\n"
    );

    let parts = json!({"messages": [{"role": "user", "content": [{"type": "text", "text": "Speak, speak."}]}]});
    assert_eq!(server.ask("/tokenize", parts)["tokens"], tokens["tokens"]);
    let without = json!({"messages": body(json!({}))["messages"], "add_generation_prompt": false});
    assert!(server.ask("/tokenize", without)["count"].as_u64() < tokens["count"].as_u64());
}

#[test]
fn without_a_limit_the_answer_has_what_is_left_of_the_context() {
    let server = Server::start();
    let mut request = body(json!({"max_completion_tokens": 3}));
    let answer = server.ask(PATH, request.clone());
    assert_eq!(answer["usage"]["completion_tokens"], 3);

    request
        .as_object_mut()
        .unwrap()
        .retain(|key, _| !key.starts_with("max"));
    let word = "speak ".repeat(1000);
    request["messages"][0]["content"] = word.into();
    let answer = server.ask(PATH, request);
    assert_eq!(answer["usage"]["total_tokens"], 4096);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
}
