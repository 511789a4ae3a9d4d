//! `POST /v1/chat/completions`.

mod messages;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

pub(super) use self::messages::Conversation;
use super::answer::{Head, UsageBody};
use super::choices::{Choice, ChoiceEvent, Choices, Prompt};
use super::error::ApiError;
use super::fields::Fields;
use super::generation::{Generation, alternatives, fit, max_tokens};
use super::logprobs::ChatLogprobs;
use super::state::App;
use super::stream::{self, Chunks};
use crate::text::{Delta, Usage};

pub(super) async fn chat(State(app): State<App>, mut fields: Fields) -> Result<Response, ApiError> {
    let mut generation = Generation::take(&mut fields, &app)?;
    generation.max_tokens = match max_tokens(&mut fields, "max_completion_tokens", 1)? {
        Some(tokens) => Some(tokens),
        None => max_tokens(&mut fields, "max_tokens", 1)?,
    };
    generation.logprobs = logprobs(&mut fields)?;
    let conversation = Conversation::take(&mut fields, true)?;
    fields.value("max_tokens");
    fields.ignore_rest();

    let tokens = conversation.tokens(&app, false).await?;
    let context = app.engine.context;
    let max_tokens = fit(
        &tokens,
        generation.max_tokens,
        context.into(),
        context,
        "messages",
    )?;
    let prompts = [Prompt { tokens, max_tokens }];
    let choices = Choices::start(&app, &prompts, &generation).await?;
    let [Prompt { tokens, .. }] = prompts;
    let prompt_token_ids = generation.return_token_ids.then_some(tokens);
    if generation.stream {
        return Ok(stream::respond(
            choices,
            ChatChunks::new(app, &generation, prompt_token_ids),
        ));
    }
    let (choices, usage) = choices.collect().await?;
    let form = Form::new(&app, &generation);
    Ok(Json(ChatBody {
        head: Head::new("chatcmpl-", "chat.completion", &app.engine.model),
        choices: choices
            .into_iter()
            .enumerate()
            .map(|(index, choice)| form.choice(index, choice))
            .collect(),
        usage: usage.into(),
        prompt_token_ids,
    })
    .into_response())
}

/// `logprobs` is a flag here, and `top_logprobs` the number of alternatives.
fn logprobs(fields: &mut Fields) -> Result<Option<u8>, ApiError> {
    let wanted = fields.flag("logprobs")?.unwrap_or(false);
    match alternatives(fields, "top_logprobs")? {
        Some(count) if count > 0 && !wanted => Err(ApiError::invalid(
            "top_logprobs",
            format!("`top_logprobs` is {count}; it is only for requests with `logprobs: true`"),
        )),
        count => Ok(wanted.then_some(count.unwrap_or(0))),
    }
}

#[derive(Serialize)]
struct ChatBody {
    #[serde(flatten)]
    head: Head,
    choices: Vec<ChatChoice>,
    usage: UsageBody,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct ChatChoice {
    index: usize,
    message: Message,
    logprobs: Option<ChatLogprobs>,
    finish_reason: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    content: String,
    /// Always absent; clients expect the key.
    refusal: Option<String>,
}

#[derive(Serialize)]
struct ChatChunk {
    #[serde(flatten)]
    head: Head,
    choices: Vec<ChunkChoice>,
    /// `null` in all chunks but the last, if the client asked for the usage.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct ChunkChoice {
    index: usize,
    delta: MessageDelta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
}

#[derive(Default, Serialize)]
struct MessageDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
}

/// What the client wants to see of an answer.
struct Form {
    app: App,
    logprobs: bool,
    token_ids: bool,
}

impl Form {
    fn new(app: &App, generation: &Generation) -> Self {
        Form {
            app: app.clone(),
            logprobs: generation.logprobs.is_some(),
            token_ids: generation.return_token_ids,
        }
    }

    fn logprobs(&self, delta: &Delta) -> Option<ChatLogprobs> {
        self.logprobs
            .then(|| ChatLogprobs::new(&self.app.engine.tokenizer, &delta.logprobs))
    }

    fn choice(&self, index: usize, choice: Choice) -> ChatChoice {
        let Choice {
            answer,
            finish_reason,
            ..
        } = choice;
        ChatChoice {
            index,
            logprobs: self.logprobs(&answer),
            message: Message {
                role: "assistant",
                content: answer.text,
                refusal: None,
            },
            finish_reason,
            token_ids: self.token_ids.then_some(answer.tokens),
        }
    }
}

struct ChatChunks {
    head: Head,
    form: Form,
    include_usage: bool,
    /// Goes with the first chunk.
    prompt_token_ids: Option<Vec<u32>>,
    /// For each answer, whether its role has been sent.
    begun: Vec<bool>,
}

impl ChatChunks {
    fn new(app: App, generation: &Generation, prompt_token_ids: Option<Vec<u32>>) -> Self {
        ChatChunks {
            head: Head::new("chatcmpl-", "chat.completion.chunk", &app.engine.model),
            form: Form::new(&app, generation),
            include_usage: generation.include_usage,
            prompt_token_ids,
            begun: vec![false; generation.n],
        }
    }

    fn chunk(&mut self, choice: ChunkChoice) -> ChatChunk {
        ChatChunk {
            head: self.head.clone(),
            choices: vec![choice],
            usage: self.include_usage.then_some(None),
            prompt_token_ids: self.prompt_token_ids.take(),
        }
    }
}

impl Chunks for ChatChunks {
    type Chunk = ChatChunk;

    fn event(&mut self, index: usize, event: ChoiceEvent) -> Vec<ChatChunk> {
        let silent = ChunkChoice {
            index,
            delta: MessageDelta::default(),
            logprobs: None,
            finish_reason: None,
            token_ids: None,
        };
        let mut chunks = Vec::new();
        if !std::mem::replace(&mut self.begun[index], true) {
            let delta = MessageDelta {
                role: Some("assistant"),
                content: Some(String::new()),
            };
            let token_ids = self.form.token_ids.then(Vec::new);
            chunks.push(self.chunk(ChunkChoice {
                index,
                delta,
                logprobs: None,
                finish_reason: None,
                token_ids,
            }));
        }
        match event {
            ChoiceEvent::Prompt(_) => {}
            ChoiceEvent::Delta(delta) => {
                let logprobs = if delta.tokens.is_empty() {
                    None
                } else {
                    self.form.logprobs(&delta)
                };
                let token_ids = self.form.token_ids.then_some(delta.tokens);
                let delta = MessageDelta {
                    role: None,
                    content: Some(delta.text),
                };
                chunks.push(self.chunk(ChunkChoice {
                    delta,
                    logprobs,
                    token_ids,
                    ..silent
                }));
            }
            ChoiceEvent::Finished(reason) => {
                chunks.push(self.chunk(ChunkChoice {
                    finish_reason: Some(reason),
                    ..silent
                }));
            }
        }
        chunks
    }

    fn usage(&mut self, usage: Usage) -> Option<ChatChunk> {
        self.include_usage.then(|| ChatChunk {
            head: self.head.clone(),
            choices: Vec::new(),
            usage: Some(Some(usage.into())),
            prompt_token_ids: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(json: serde_json::Value) -> Result<Option<u8>, ApiError> {
        logprobs(&mut Fields::parse(json.to_string().as_bytes()).unwrap())
    }

    #[test]
    fn logprobs_is_a_flag_with_a_number_beside_it() {
        assert_eq!(take(serde_json::json!({})).unwrap(), None);
        assert_eq!(
            take(serde_json::json!({"logprobs": true})).unwrap(),
            Some(0)
        );
        assert_eq!(
            take(serde_json::json!({"logprobs": true, "top_logprobs": 20})).unwrap(),
            Some(20)
        );
        assert_eq!(
            take(serde_json::json!({"logprobs": false, "top_logprobs": 0})).unwrap(),
            None
        );
        for wrong in [
            serde_json::json!({"top_logprobs": 5}),
            serde_json::json!({"logprobs": 1}),
            serde_json::json!({"logprobs": true, "top_logprobs": 21}),
        ] {
            assert!(take(wrong).is_err());
        }
    }
}
