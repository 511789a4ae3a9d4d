//! Completions as a stream.

use serde::Serialize;

use super::{CompletionChoice, Form};
use crate::http::answer::{Head, UsageBody};
use crate::http::choices::ChoiceEvent;
use crate::http::logprobs::{CompletionLogprobs, LogprobWriter};
use crate::http::stream::Chunks;
use crate::text::Usage;

#[derive(Serialize)]
pub(super) struct CompletionChunk {
    #[serde(flatten)]
    head: Head,
    choices: Vec<CompletionChoice>,
    /// `null` in all chunks but the last, if the client asked for the usage.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<UsageBody>>,
}

pub(super) struct CompletionChunks {
    head: Head,
    form: Form,
    include_usage: bool,
    /// For each answer that has begun, what writes its log-probabilities.
    writers: Vec<Option<LogprobWriter>>,
}

impl CompletionChunks {
    pub(super) fn new(form: Form, include_usage: bool) -> Self {
        let answers = form.prompts.len() * form.n;
        CompletionChunks {
            head: form.head(),
            form,
            include_usage,
            writers: (0..answers).map(|_| None).collect(),
        }
    }

    /// The first chunk of an answer, if there is anything to say before its first token.
    fn begin(&mut self, index: usize, event: &ChoiceEvent) -> Option<CompletionChunk> {
        if self.writers[index].is_some() {
            return None;
        }
        self.writers[index] = Some(self.form.writer(index));
        let echo = self.form.echo;
        let logprobs = match event {
            ChoiceEvent::Prompt(logprobs) if echo => {
                Some(self.form.prompt_logprobs(index, logprobs))
            }
            _ => None,
        };
        let prompt_token_ids = self.form.prompt_token_ids(index);
        (echo || prompt_token_ids.is_some()).then(|| {
            let text = if echo {
                self.form.prompt(index).text.clone()
            } else {
                String::new()
            };
            let token_ids = self.form.token_ids.then(Vec::new);
            self.chunk(CompletionChoice {
                index,
                text,
                logprobs,
                finish_reason: None,
                token_ids,
                prompt_token_ids,
            })
        })
    }

    fn chunk(&self, choice: CompletionChoice) -> CompletionChunk {
        CompletionChunk {
            head: self.head.clone(),
            choices: vec![choice],
            usage: self.include_usage.then_some(None),
        }
    }
}

impl Chunks for CompletionChunks {
    type Chunk = CompletionChunk;

    fn event(&mut self, index: usize, event: ChoiceEvent) -> Vec<CompletionChunk> {
        let mut chunks: Vec<CompletionChunk> = self.begin(index, &event).into_iter().collect();
        let choice = CompletionChoice {
            index,
            text: String::new(),
            logprobs: None,
            finish_reason: None,
            token_ids: None,
            prompt_token_ids: None,
        };
        match event {
            ChoiceEvent::Prompt(_) => {}
            ChoiceEvent::Delta(delta) => {
                let writer = self.writers[index]
                    .as_mut()
                    .filter(|_| self.form.logprobs && !delta.tokens.is_empty());
                let logprobs = writer.map(|writer| {
                    let mut logprobs = CompletionLogprobs::default();
                    logprobs.extend(writer, &delta.logprobs);
                    logprobs
                });
                let token_ids = self.form.token_ids.then_some(delta.tokens);
                chunks.push(self.chunk(CompletionChoice {
                    text: delta.text,
                    logprobs,
                    token_ids,
                    ..choice
                }));
            }
            ChoiceEvent::Finished(reason) => {
                chunks.push(self.chunk(CompletionChoice {
                    finish_reason: Some(reason),
                    ..choice
                }));
            }
        }
        chunks
    }

    fn usage(&mut self, usage: Usage) -> Option<CompletionChunk> {
        let usage = Some(Some(usage.into()));
        self.include_usage.then(|| CompletionChunk {
            head: self.head.clone(),
            choices: Vec::new(),
            usage,
        })
    }
}
