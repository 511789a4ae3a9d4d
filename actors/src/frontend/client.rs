//! How the rest of the program asks the cluster for tokens.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use actix::Addr;
use tokio::sync::mpsc;

use super::actor::{AskStatus, Cancel, Complete, Drain, Enqueue, Frontend, Status};
use crate::protocol::SequenceId;
use crate::request::{FinishReason, Request, RequestEvent, SubmitError};

/// The frontend answers within this time or counts as stopped.
const ANSWER_DEADLINE: Duration = Duration::from_secs(10);

/// A handle on the cluster's frontend. Cheap to clone; usable from any thread and any tokio runtime.
#[derive(Clone)]
pub struct Client {
    frontend: Addr<Frontend>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("connected", &self.frontend.connected())
            .finish()
    }
}

impl Client {
    pub(crate) fn new(frontend: Addr<Frontend>) -> Self {
        Client { frontend }
    }

    /// Hands a request in. The stream it returns yields tokens as they come; dropping it cancels the request.
    ///
    /// # Errors
    /// When the request can never run, or not now; see [`SubmitError::is_overload`].
    pub async fn submit(&self, request: Request) -> Result<RequestStream, SubmitError> {
        // Unbounded, but never longer than the request's own tokens.
        let (events, receiver) = mpsc::unbounded_channel();
        let answer = self.frontend.send(Enqueue { request, events });
        let answer = tokio::time::timeout(ANSWER_DEADLINE, answer).await;
        let sequence = answer
            .ok()
            .and_then(Result::ok)
            .ok_or(SubmitError::Stopped)??;
        let frontend = self.frontend.clone();
        Ok(RequestStream {
            sequence,
            receiver,
            frontend,
            finished: false,
        })
    }

    /// How the cluster stands; `None` if the frontend does not answer in time.
    pub async fn status(&self) -> Option<Status> {
        let answer = self.frontend.send(AskStatus);
        tokio::time::timeout(ANSWER_DEADLINE, answer)
            .await
            .ok()?
            .ok()
    }

    /// Takes no new requests from now on; those under way go on.
    pub async fn drain(&self) {
        // A frontend that is gone takes no requests either.
        let _ = self.frontend.send(Drain).await;
    }
}

/// The events of one request, in order, ending with [`RequestEvent::Finished`].
pub struct RequestStream {
    sequence: SequenceId,
    receiver: mpsc::UnboundedReceiver<RequestEvent>,
    frontend: Addr<Frontend>,
    finished: bool,
}

impl RequestStream {
    /// The request's name in logs.
    pub fn sequence(&self) -> SequenceId {
        self.sequence
    }

    /// Ends the request, because what has come is all that is wanted (a stop string, say). It counts as stopped, not as cancelled.
    pub fn complete(mut self) {
        // If the mailbox is full, the drop of the stream cancels it.
        self.finished |= self.frontend.try_send(Complete(self.sequence)).is_ok();
    }

    /// The next event; `None` after the last one. A frontend that stops ends the stream with an error event.
    pub async fn next(&mut self) -> Option<RequestEvent> {
        std::future::poll_fn(|cx| self.poll_next(cx)).await
    }

    /// As [`RequestStream::next`], for those who write their own futures.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<RequestEvent>> {
        if self.finished {
            return Poll::Ready(None);
        }
        let event = match Pin::new(&mut self.receiver).poll_recv(cx) {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(Some(event)) => event,
            Poll::Ready(None) => {
                let reason = "the cluster has stopped; its log says why".to_owned();
                RequestEvent::Finished(FinishReason::Error(reason))
            }
        };
        self.finished = matches!(event, RequestEvent::Finished(_));
        Poll::Ready(Some(event))
    }
}

impl Drop for RequestStream {
    fn drop(&mut self) {
        if !self.finished {
            // If the mailbox is full, the frontend notices at the next token that nobody listens.
            let _ = self.frontend.try_send(Cancel(self.sequence));
        }
    }
}
