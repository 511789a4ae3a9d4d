//! The answers of one request, generated side by side.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};
use volley_actors::{FinishReason, TokenLogprob};

use super::error::ApiError;
use super::generation::Generation;
use super::state::App;
use crate::text::{self, Delta, TextEvent, TextStream, Usage};

/// Answers of one request, over all its prompts.
const CHOICES_MAX: usize = 1024;

/// A prompt and the length of its answers.
#[derive(Debug)]
pub(super) struct Prompt {
    pub(super) tokens: Vec<u32>,
    pub(super) max_tokens: u32,
}

/// The answers, prompt by prompt. Dropping them cancels those that have not ended.
pub(super) struct Choices {
    streams: Vec<Option<TextStream>>,
    /// Where to look first, so that no answer starves the others.
    turn: usize,
    deadline: Pin<Box<Sleep>>,
    timeout: Duration,
    usage: Usage,
}

/// One whole answer.
#[derive(Debug, Default)]
pub(super) struct Choice {
    pub(super) prompt_logprobs: Vec<TokenLogprob>,
    pub(super) answer: Delta,
    /// `stop` or `length`.
    pub(super) finish_reason: &'static str,
}

/// What happened to an answer.
#[derive(Debug)]
pub(super) enum ChoiceEvent {
    /// See [`TextEvent::Prompt`].
    Prompt(Vec<TokenLogprob>),
    /// It goes on.
    Delta(Delta),
    /// It ended: `stop` or `length`.
    Finished(&'static str),
}

impl Choices {
    /// Hands in `n` requests for each prompt.
    ///
    /// # Errors
    /// When one of them is refused; none is run then.
    pub(super) async fn start(
        app: &App,
        prompts: &[Prompt],
        generation: &Generation,
    ) -> Result<Self, ApiError> {
        let count = prompts.len() * generation.n;
        if count > CHOICES_MAX {
            let message = format!(
                "the request asks for {count} answers ({} prompts, {} each); {CHOICES_MAX} are allowed",
                prompts.len(),
                generation.n
            );
            return Err(ApiError::invalid("n", message));
        }
        let timeout = app.options.request_timeout;
        // Begins before the first request is handed in.
        let deadline = Box::pin(tokio::time::sleep_until(Instant::now() + timeout));
        let mut streams = Vec::with_capacity(count);
        for prompt in prompts {
            for index in 0..generation.n {
                let request = generation.request(&prompt.tokens, index, prompt.max_tokens);
                streams.push(Some(text::generate(&app.engine, request).await?));
            }
        }
        // A prompt counts once, however many answers it has.
        let prompt_tokens = prompts
            .iter()
            .map(|prompt| prompt.tokens.len() as u64)
            .sum();
        Ok(Choices {
            streams,
            turn: 0,
            deadline,
            timeout,
            usage: Usage {
                prompt_tokens,
                completion_tokens: 0,
            },
        })
    }

    /// The next event and the index of its answer; `None` after the end of the last one. An error is the end of all.
    pub(super) async fn next(&mut self) -> Option<Result<(usize, ChoiceEvent), ApiError>> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// What the answers that have ended took.
    pub(super) fn usage(&self) -> Usage {
        self.usage
    }

    /// Waits for all answers.
    pub(super) async fn collect(mut self) -> Result<(Vec<Choice>, Usage), ApiError> {
        let mut choices: Vec<Choice> = self.streams.iter().map(|_| Choice::default()).collect();
        while let Some(event) = self.next().await {
            let (index, event) = event?;
            let choice = &mut choices[index];
            match event {
                ChoiceEvent::Prompt(logprobs) => choice.prompt_logprobs = logprobs,
                ChoiceEvent::Delta(delta) => {
                    choice.answer.text += &delta.text;
                    choice.answer.tokens.extend(delta.tokens);
                    choice.answer.logprobs.extend(delta.logprobs);
                }
                ChoiceEvent::Finished(reason) => choice.finish_reason = reason,
            }
        }
        Ok((choices, self.usage))
    }

    fn poll_next(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<(usize, ChoiceEvent), ApiError>>> {
        let count = self.streams.len();
        if self.streams.iter().all(Option::is_none) {
            return Poll::Ready(None);
        }
        if self.deadline.as_mut().poll(cx).is_ready() {
            self.streams.clear();
            return Poll::Ready(Some(Err(ApiError::timed_out(self.timeout.as_secs_f64()))));
        }
        let mut live = false;
        for offset in 0..count {
            let index = (self.turn + offset) % count;
            let slot = &mut self.streams[index];
            let Some(stream) = slot else { continue };
            match stream.poll_next(cx) {
                Poll::Pending => live = true,
                Poll::Ready(None) => *slot = None,
                Poll::Ready(Some(event)) => {
                    self.turn = (index + 1) % count;
                    let event = self.event(event);
                    if event.is_err() {
                        self.streams.clear();
                    }
                    return Poll::Ready(Some(event.map(|event| (index, event))));
                }
            }
        }
        if live {
            Poll::Pending
        } else {
            Poll::Ready(None)
        }
    }

    fn event(&mut self, event: TextEvent) -> Result<ChoiceEvent, ApiError> {
        Ok(match event {
            TextEvent::Prompt(logprobs) => ChoiceEvent::Prompt(logprobs),
            TextEvent::Delta(delta) => ChoiceEvent::Delta(delta),
            TextEvent::Finished { reason, usage } => {
                self.usage.completion_tokens += usage.completion_tokens;
                match reason {
                    FinishReason::Stop => ChoiceEvent::Finished("stop"),
                    FinishReason::Length => ChoiceEvent::Finished("length"),
                    FinishReason::Cancelled => {
                        return Err(ApiError::internal(
                            "the request was cancelled by the server",
                        ));
                    }
                    FinishReason::Error(reason) => return Err(ApiError::internal(reason)),
                }
            }
        })
    }
}
