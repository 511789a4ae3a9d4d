//! Answers as server-sent events: `data: {json}` for every chunk, at last `data: [DONE]`.
//!
//! The body is made as the client reads it: nothing piles up but the tokens of the cluster, which are bounded by the request's length. When the client
//! goes away the body is dropped, and with it the requests.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::choices::{ChoiceEvent, Choices};
use super::error::ApiError;
use crate::text::Usage;

/// A comment is sent after so much silence, lest somebody on the way thinks the connection dead.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// How an API cuts its answers into chunks.
pub(super) trait Chunks: Send + 'static {
    type Chunk: Serialize;

    /// The chunks that follow from an event of an answer.
    fn event(&mut self, index: usize, event: ChoiceEvent) -> Vec<Self::Chunk>;

    /// The last chunk, if the client asked for the usage.
    fn usage(&mut self, usage: Usage) -> Option<Self::Chunk>;
}

/// The response that streams `choices`.
pub(super) fn respond(choices: Choices, chunks: impl Chunks) -> Response {
    let state = Streaming {
        choices,
        chunks,
        ready: VecDeque::new(),
        ended: false,
    };
    let events = futures_util::stream::unfold(state, |mut state| async move {
        let event = state.next().await?;
        Some((Ok::<_, Infallible>(event), state))
    });
    Sse::new(events)
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response()
}

struct Streaming<C> {
    choices: Choices,
    chunks: C,
    ready: VecDeque<Event>,
    ended: bool,
}

impl<C: Chunks> Streaming<C> {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            match self.choices.next().await {
                Some(Ok((index, event))) => {
                    let chunks = self.chunks.event(index, event);
                    self.ready.extend(chunks.iter().map(data));
                }
                Some(Err(error)) => {
                    self.ready.push_back(data(&error.envelope()));
                    self.end();
                }
                None => {
                    self.ready
                        .extend(self.chunks.usage(self.choices.usage()).as_ref().map(data));
                    self.end();
                }
            }
        }
    }

    fn end(&mut self) {
        self.ended = true;
        self.ready.push_back(Event::default().data("[DONE]"));
    }
}

fn data(chunk: &impl Serialize) -> Event {
    match serde_json::to_string(chunk) {
        Ok(json) => Event::default().data(json),
        // Chunks are plain structures with string keys; they do not fail.
        Err(error) => {
            let error = ApiError::internal(format!("a chunk could not be written: {error}"));
            Event::default().data(serde_json::to_string(&error.envelope()).unwrap_or_default())
        }
    }
}
