//! Text out of a cluster that speaks in tokens: detokenising as tokens come, stop strings across token borders, usage.
//!
//! [`generate`] hands a [`TextRequest`] in and returns a [`TextStream`] of [`TextEvent`]s. What it does to the events of the cluster is
//! decided by two machines without clock or thread: the decoder here and [`StopStrings`].

mod decoder;
mod stop_strings;
#[cfg(test)]
pub(crate) mod testing;

use std::collections::VecDeque;
use std::task::{Context, Poll, ready};

use volley_actors::{FinishReason, Request, RequestStream, SubmitError, TokenLogprob};

use self::decoder::Decoder;
pub use self::stop_strings::StopStrings;
use crate::engine::Engine;

/// One sequence to be generated, as text.
#[derive(Debug, Clone)]
pub struct TextRequest {
    /// The sequence, in tokens. A generated token among its `stop_tokens` ends it and has no text.
    pub request: Request,
    /// Any of these texts in the output ends it; the text before the first one is the answer. None may be empty.
    pub stop: Vec<String>,
    /// Whether special tokens have no text.
    pub skip_special: bool,
}

/// A part of the answer.
#[derive(Debug, Clone, PartialEq)]
pub enum TextEvent {
    /// Log-probabilities of the prompt's tokens from the second one on, all at once and before anything else. Only if asked for.
    Prompt(Vec<TokenLogprob>),
    /// The answer goes on.
    Delta(Delta),
    /// The end; nothing follows.
    Finished {
        /// Why. A stop string counts as [`FinishReason::Stop`].
        reason: FinishReason,
        /// What was computed.
        usage: Usage,
    },
}

/// A piece of text and the tokens that came with it.
///
/// Text is held back while it may be the beginning of a stop string or a part of a character, so a piece is not the text of just these tokens;
/// all pieces together are the text of all tokens, up to the stop string. Tokens are all reported, those of a stop string and the stop token too.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Delta {
    /// More text; may be empty in the last piece.
    pub text: String,
    /// More tokens; empty where text comes that was held back.
    pub tokens: Vec<u32>,
    /// Of these tokens, if asked for.
    pub logprobs: Vec<TokenLogprob>,
}

/// What a request took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u64,
    /// Tokens generated, with those that have no text.
    pub completion_tokens: u64,
}

/// Hands a request in.
///
/// # Errors
/// When the request can never run, or not now; see [`SubmitError::is_overload`].
pub async fn generate(engine: &Engine, request: TextRequest) -> Result<TextStream, SubmitError> {
    let decoder = Decoder::new(&engine.tokenizer, &request);
    let tokens = engine.client.submit(request.request).await?;
    Ok(TextStream {
        tokens: Some(tokens),
        decoder,
        ready: VecDeque::new(),
    })
}

/// The events of one request, in order, ending with [`TextEvent::Finished`]. Dropping it cancels the request.
pub struct TextStream {
    /// `None` from the end on.
    tokens: Option<RequestStream>,
    decoder: Decoder,
    ready: VecDeque<TextEvent>,
}

impl std::fmt::Debug for TextStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sequence = self.tokens.as_ref().map(RequestStream::sequence);
        f.debug_struct("TextStream")
            .field("sequence", &sequence)
            .finish_non_exhaustive()
    }
}

impl TextStream {
    /// The next event; `None` after the last one.
    pub async fn next(&mut self) -> Option<TextEvent> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// As [`TextStream::next`], for those who write their own futures.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<TextEvent>> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Poll::Ready(Some(event));
            }
            let Some(tokens) = &mut self.tokens else {
                return Poll::Ready(None);
            };
            match ready!(tokens.poll_next(cx)) {
                Some(event) => self.decoder.event(event, &mut self.ready),
                None => self.tokens = None,
            }
            if self.decoder.ended()
                && let Some(tokens) = self.tokens.take()
            {
                // After a stop string the cluster still computes.
                tokens.complete();
            }
        }
    }
}
