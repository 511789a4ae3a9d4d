//! `POST /v1/completions`.

use std::path::Path;

use serde_json::{Value, json};

use crate::server::{MODEL, Server};

const PATH: &str = "/v1/completions";

/// Prompts with the greedy continuations that transformers computes.
fn golden() -> Vec<Value> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../integration/fixtures/golden/tiny-mixtral.json");
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn logprobs(choice: &Value) -> Vec<Option<f64>> {
    choice["logprobs"]["token_logprobs"]
        .as_array()
        .unwrap()
        .iter()
        .map(Value::as_f64)
        .collect()
}

#[test]
fn greedy_answers_are_those_of_transformers() {
    let server = Server::start();
    for case in golden() {
        let count = case["greedy_ids"].as_array().unwrap().len();
        let request = json!({"model": MODEL, "max_tokens": count, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
        for prompt in [&case["prompt"], &case["prompt_ids"]] {
            let mut request = request.clone();
            request["prompt"] = prompt.clone();
            let answer = server.ask(PATH, request);
            assert_eq!(answer["choices"][0]["token_ids"], case["greedy_ids"]);
            assert_eq!(answer["choices"][0]["prompt_token_ids"], case["prompt_ids"]);
        }
    }
}

#[test]
fn answers_are_numbered_prompt_by_prompt() {
    let server = Server::start();
    let prompts: Vec<Value> = golden()
        .iter()
        .map(|case| case["prompt_ids"].clone())
        .collect();
    let request = json!({"prompt": prompts, "n": 2, "max_tokens": 4, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    let answer = server.ask(PATH, request);
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 2 * prompts.len());
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], index);
        assert_eq!(choice["prompt_token_ids"], prompts[index / 2]);
        assert_eq!(
            choice["token_ids"].as_array().unwrap(),
            &golden()[index / 2]["greedy_ids"].as_array().unwrap()[..4]
        );
    }
    let prompt_tokens: usize = prompts
        .iter()
        .map(|prompt| prompt.as_array().unwrap().len())
        .sum();
    assert_eq!(
        answer["usage"],
        json!({"prompt_tokens": prompt_tokens, "completion_tokens": 32, "total_tokens": prompt_tokens + 32})
    );
}

/// What lm-eval's `local-completions` sends, and how it reads the answer.
#[test]
fn loglikelihoods_as_lm_eval_asks_for_them() {
    let server = Server::start();
    let case = &golden()[0];
    let prompt = case["prompt_ids"].as_array().unwrap();
    let continuation = &case["greedy_ids"].as_array().unwrap()[..8];
    let tokens: Vec<Value> = prompt.iter().chain(continuation).cloned().collect();
    for max_tokens in [1, 0] {
        let request = json!({
            "model": MODEL, "prompt": [tokens], "max_tokens": max_tokens, "temperature": 0, "logprobs": 1, "echo": true, "seed": 1234, "ignore_eos": true,
        });
        let answer = server.ask(PATH, request);
        let choice = &answer["choices"][0];
        let lists = &choice["logprobs"];
        for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
            assert_eq!(
                lists[list].as_array().unwrap().len(),
                tokens.len() + max_tokens,
                "{list}"
            );
        }
        assert_eq!(lists["token_logprobs"][0], Value::Null);
        assert_eq!(lists["top_logprobs"][0], Value::Null);
        // The continuation is greedy: each of its tokens is the best of its alternatives, so there is no other.
        for at in prompt.len()..tokens.len() {
            let top = lists["top_logprobs"][at].as_object().unwrap();
            assert_eq!(top.len(), 1);
            assert_eq!(
                top.get(lists["tokens"][at].as_str().unwrap()),
                Some(&lists["token_logprobs"][at])
            );
        }
        assert!(
            logprobs(choice)[1..]
                .iter()
                .all(|logprob| logprob.unwrap() <= 0.0)
        );
        assert_eq!(answer["usage"]["completion_tokens"], max_tokens);
        assert_eq!(choice["finish_reason"], "length");
    }
}

#[test]
fn a_token_has_the_same_logprob_in_a_prompt_and_in_an_answer() {
    let server = Server::start();
    let request = json!({"prompt": "ROMEO:\n", "max_tokens": 8, "temperature": 0, "logprobs": 2, "echo": true, "ignore_eos": true, "return_token_ids": true});
    let generated = server.ask(PATH, request.clone());
    let choice = &generated["choices"][0];
    let ids = |key: &str| choice[key].as_array().unwrap().clone();
    let mut again = request;
    again["prompt"] = [ids("prompt_token_ids"), ids("token_ids")].concat().into();
    again["max_tokens"] = 0.into();
    let given = server.ask(PATH, again);
    // Bit for bit: a row's result does not depend on the batch around it.
    assert_eq!(logprobs(&given["choices"][0]), logprobs(choice));
    assert_eq!(
        given["choices"][0]["logprobs"]["top_logprobs"],
        choice["logprobs"]["top_logprobs"]
    );
}

#[test]
fn echo_returns_the_prompt_and_offsets_point_into_the_text() {
    let server = Server::start();
    let prompt = "caf\u{e9} you speak";
    let request = json!({"prompt": prompt, "max_tokens": 0, "logprobs": 0, "echo": true});
    let answer = server.ask(PATH, request.clone());
    let choice = &answer["choices"][0];
    assert_eq!(choice["text"], prompt);
    let chars: Vec<char> = prompt.chars().collect();
    let offsets: Vec<usize> = choice["logprobs"]["text_offset"]
        .as_array()
        .unwrap()
        .iter()
        .map(|o| o.as_u64().unwrap() as usize)
        .collect();
    let tokens = choice["logprobs"]["tokens"].as_array().unwrap();
    for (offset, token) in offsets.iter().zip(tokens) {
        let token = token.as_str().unwrap();
        if !token.starts_with("bytes:") {
            assert!(
                chars[*offset..]
                    .iter()
                    .collect::<String>()
                    .starts_with(token),
                "{token} at {offset}"
            );
        }
    }
    // Generated text goes on where the prompt ends, streamed or not.
    let mut longer = request;
    longer["max_tokens"] = 5.into();
    longer["temperature"] = 0.into();
    longer["ignore_eos"] = true.into();
    let whole = server.ask(PATH, longer.clone());
    assert_eq!(
        whole["choices"][0]["logprobs"]["text_offset"][tokens.len()],
        chars.len()
    );
    longer["stream"] = true.into();
    let chunks = server.stream(PATH, longer);
    let parts = || chunks.iter().map(|chunk| &chunk["choices"][0]);
    let text: String = parts()
        .map(|choice| choice["text"].as_str().unwrap())
        .collect();
    assert_eq!(text, whole["choices"][0]["text"].as_str().unwrap());
    for list in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        let streamed: Vec<Value> = parts()
            .filter_map(|choice| choice["logprobs"][list].as_array().cloned())
            .flatten()
            .collect();
        assert_eq!(
            &streamed,
            whole["choices"][0]["logprobs"][list].as_array().unwrap(),
            "{list}"
        );
    }
}

#[test]
fn a_stop_string_cuts_at_its_first_occurrence() {
    let server = Server::start();
    let request =
        json!({"prompt": "return", "max_tokens": 32, "temperature": 0, "ignore_eos": true});
    let whole = server.ask(PATH, request.clone())["choices"][0]["text"]
        .as_str()
        .unwrap()
        .to_owned();
    // Any three characters of the middle, wherever the borders of tokens are.
    let chars: Vec<char> = whole
        .chars()
        .filter(|&c| c != char::REPLACEMENT_CHARACTER)
        .collect();
    for at in (4..chars.len() - 3).step_by(5) {
        let stop: String = chars[at..at + 3].iter().collect();
        let Some(cut) = whole.find(&stop) else {
            continue;
        };
        for stream in [false, true] {
            let mut request = request.clone();
            request["stop"] = json!(["never said", stop]);
            request["stream"] = stream.into();
            let (text, reason) = if stream {
                let chunks = server.stream(PATH, request);
                let texts = chunks
                    .iter()
                    .map(|chunk| chunk["choices"][0]["text"].as_str().unwrap());
                (
                    texts.collect::<String>(),
                    chunks.last().unwrap()["choices"][0]["finish_reason"].clone(),
                )
            } else {
                let choice = &server.ask(PATH, request)["choices"][0];
                (
                    choice["text"].as_str().unwrap().to_owned(),
                    choice["finish_reason"].clone(),
                )
            };
            assert_eq!(text, &whole[..cut]);
            assert_eq!(reason, "stop");
        }
    }
}

#[test]
fn a_stop_token_ends_an_answer_and_has_no_text() {
    let server = Server::start();
    let case = &golden()[3];
    let ids = case["greedy_ids"].as_array().unwrap();
    let request = json!({"prompt": case["prompt_ids"], "max_tokens": 32, "temperature": 0, "return_token_ids": true, "stop_token_ids": [ids[4]]});
    let answer = server.ask(PATH, request);
    let choice = &answer["choices"][0];
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(choice["token_ids"].as_array().unwrap(), &ids[..5]);
    assert_eq!(answer["usage"]["completion_tokens"], 5);
    let text = server.ask("/detokenize", json!({"tokens": &ids[..4]}));
    assert_eq!(choice["text"], text["prompt"]);
}

#[test]
fn a_bias_forces_a_token() {
    let server = Server::start();
    let request = json!({"prompt": "a", "max_tokens": 3, "ignore_eos": true, "logit_bias": {"65": 100}, "return_token_ids": true});
    assert_eq!(
        server.ask(PATH, request)["choices"][0]["token_ids"],
        json!([65, 65, 65])
    );
}

#[test]
fn sixteen_tokens_if_nobody_says() {
    let server = Server::start();
    assert_eq!(
        server.ask(PATH, json!({"prompt": "a", "ignore_eos": true}))["usage"]["completion_tokens"],
        16
    );
}
