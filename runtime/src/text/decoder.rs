//! Events in tokens to events in text.

use std::collections::VecDeque;

use volley_actors::{FinishReason, RequestEvent, TokenLogprob};
use volley_models::{Detokenizer, Tokenizer, TokenizerError};

use super::{Delta, StopStrings, TextEvent, TextRequest, Usage};

/// What stands between one request's tokens and its text.
pub(super) struct Decoder {
    /// `None` from the end on.
    detokenizer: Option<Detokenizer>,
    stops: StopStrings,
    stop_tokens: Vec<u32>,
    /// Prompt log-probabilities that have not been passed on; `None` once they have, or if nobody wants any.
    prompt: Option<Vec<TokenLogprob>>,
    /// Tokens that have not been passed on.
    pending: Delta,
    usage: Usage,
}

impl Decoder {
    pub(super) fn new(tokenizer: &Tokenizer, request: &TextRequest) -> Self {
        Decoder {
            detokenizer: Some(tokenizer.detokenizer(request.skip_special)),
            stops: StopStrings::new(request.stop.clone()),
            stop_tokens: request.request.stop_tokens.clone(),
            prompt: request.request.prompt_logprobs.map(|_| Vec::new()),
            pending: Delta::default(),
            usage: Usage {
                prompt_tokens: request.request.prompt.len() as u64,
                completion_tokens: 0,
            },
        }
    }

    /// Takes an event and appends what follows from it to `ready`. After the end nothing follows.
    pub(super) fn event(&mut self, event: RequestEvent, ready: &mut VecDeque<TextEvent>) {
        if self.ended() {
            return;
        }
        if let RequestEvent::Prompt(part) = event {
            if let Some(prompt) = &mut self.prompt {
                prompt.extend(part);
            }
            return;
        }
        if let Some(prompt) = self.prompt.take() {
            ready.push_back(TextEvent::Prompt(prompt));
        }
        match event {
            RequestEvent::Prompt(_) => {}
            RequestEvent::Token { token, logprob } => self.token(token, logprob, ready),
            RequestEvent::Finished(reason) => self.finish(reason, ready),
        }
    }

    /// Whether [`TextEvent::Finished`] was given out.
    pub(super) fn ended(&self) -> bool {
        self.detokenizer.is_none()
    }

    fn token(
        &mut self,
        token: u32,
        logprob: Option<TokenLogprob>,
        ready: &mut VecDeque<TextEvent>,
    ) {
        self.usage.completion_tokens += 1;
        self.pending.tokens.push(token);
        self.pending.logprobs.extend(logprob);
        if self.stop_tokens.contains(&token) {
            return;
        }
        let Some(detokenizer) = &mut self.detokenizer else {
            return;
        };
        match detokenizer.push(token) {
            Ok(Some(text)) => {
                self.pending.text += &self.stops.push(&text);
                if self.stops.stopped() {
                    self.end(FinishReason::Stop, ready);
                } else {
                    self.pass_on(ready);
                }
            }
            Ok(None) => {}
            Err(error) => self.fail(&error, ready),
        }
    }

    fn finish(&mut self, reason: FinishReason, ready: &mut VecDeque<TextEvent>) {
        let Some(detokenizer) = self.detokenizer.take() else {
            return;
        };
        match detokenizer.finish() {
            Ok(text) => {
                self.pending.text += &self.stops.push(&text.unwrap_or_default());
                self.pending.text += &self.stops.finish();
                let ended_well = matches!(reason, FinishReason::Stop | FinishReason::Length);
                let stopped = self.stops.stopped() && ended_well;
                self.end(if stopped { FinishReason::Stop } else { reason }, ready);
            }
            Err(error) => self.fail(&error, ready),
        }
    }

    fn fail(&mut self, error: &TokenizerError, ready: &mut VecDeque<TextEvent>) {
        self.end(FinishReason::Error(error.to_string()), ready);
    }

    fn end(&mut self, reason: FinishReason, ready: &mut VecDeque<TextEvent>) {
        self.detokenizer = None;
        if !self.pending.tokens.is_empty() {
            ready.push_back(TextEvent::Delta(std::mem::take(&mut self.pending)));
        }
        self.pass_on(ready);
        ready.push_back(TextEvent::Finished {
            reason,
            usage: self.usage,
        });
    }

    /// Tokens without text yet wait for it.
    fn pass_on(&mut self, ready: &mut VecDeque<TextEvent>) {
        if !self.pending.text.is_empty() {
            ready.push_back(TextEvent::Delta(std::mem::take(&mut self.pending)));
        }
    }
}

#[cfg(test)]
mod tests;
