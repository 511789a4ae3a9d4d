//! A scheduler in a process of its own: offers itself to the controller, and answers what it is asked over the link.
//!
//! It knows lengths of sequences and nothing else, and keeps nothing: whenever it begins to plan it is told everything there is to know
//! ([`SchedulerEvent::Introduced`](crate::protocol::SchedulerEvent)). So it can be killed at any time, and any number of them can stand by.

use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use volley_transports::quic::{ControlReceiver, ControlSender, NodeRole, QuicNode};

use super::message::{FromScheduler, ToScheduler, decode, encode};
use super::redial::Redial;
use crate::scheduler::Scheduler;

/// The controller has this long to answer a hello.
const WELCOME_DEADLINE: Duration = Duration::from_secs(5);

/// What the controller's configuration says that a policy may want to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SchedulingHints {
    /// Prompt tokens in one step at most.
    pub prefill_tokens: u32,
    /// Rows of a micro-batch before another is opened.
    pub micro_batch_rows: u32,
}

/// What a scheduler of another process is made of.
pub struct RemoteScheduler {
    /// Its name for people; each should have its own.
    pub name: String,
    /// The network; its certificate must be a scheduler's.
    pub node: QuicNode,
    /// Finds the controller; asked again before each call, so it may move.
    pub controller: Box<dyn FnMut() -> Result<SocketAddr, String>>,
    /// The term of its election, none while it stands by. A sender that is gone means that nobody is elected: whoever came first plans.
    pub term: watch::Receiver<Option<u64>>,
    /// Makes the scheduler, anew for each link.
    pub make: Box<dyn Fn(SchedulingHints) -> Box<dyn Scheduler>>,
}

/// Why a scheduler ended.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RemoteSchedulerError {
    /// The controller does not want it.
    #[error("the controller at {controller} refuses the scheduler: {reason}")]
    Refused {
        /// Where it is.
        controller: SocketAddr,
        /// Why.
        reason: String,
    },
}

/// How a link came to nothing.
enum Ended {
    /// Call again.
    Later(String),
    Refused(RemoteSchedulerError),
}

fn later(reason: impl ToString) -> Ended {
    Ended::Later(reason.to_string())
}

impl RemoteScheduler {
    /// Runs until `leave`, or until it is refused. What is being planned then is planned by another.
    ///
    /// # Errors
    /// The controller refuses it.
    pub async fn run(
        mut self,
        leave: impl Future<Output = ()>,
    ) -> Result<(), RemoteSchedulerError> {
        let mut leave = std::pin::pin!(leave);
        let mut redial = Redial::new();
        loop {
            let ended = tokio::select! {
                ended = self.serve(&mut redial) => ended,
                () = &mut leave => return Ok(()),
            };
            match ended {
                Ended::Refused(error) => return Err(error),
                Ended::Later(reason) => {
                    if redial.complains() {
                        tracing::warn!("{reason}; calling again");
                    }
                }
            }
            tokio::select! {
                () = sleep(redial.next_pause()) => {}
                () = &mut leave => return Ok(()),
            }
        }
    }

    /// One link, from the call to its end.
    async fn serve(&mut self, redial: &mut Redial) -> Ended {
        match self.call().await {
            Err(ended) => ended,
            Ok((controller, hints, sender, receiver)) => {
                redial.reached();
                tracing::info!(
                    "{} offers itself to the controller at {controller}",
                    self.name
                );
                let scheduler = (self.make)(hints);
                let reason = self.answer(scheduler, sender, receiver).await;
                later(format!("the link to the controller broke ({reason})"))
            }
        }
    }

    async fn call(
        &mut self,
    ) -> Result<(SocketAddr, SchedulingHints, ControlSender, ControlReceiver), Ended> {
        let controller = (self.controller)().map_err(later)?;
        let link = self.node.call(controller, NodeRole::Controller).await;
        let (mut sender, mut receiver) = link.map_err(later)?.split();
        let hello = FromScheduler::Hello {
            volley: env!("CARGO_PKG_VERSION").to_owned(),
            name: self.name.clone(),
            term: *self.term.borrow_and_update(),
        };
        sender.send(&encode(&hello)).await.map_err(later)?;
        let answer = timeout(WELCOME_DEADLINE, receiver.recv()).await;
        let answer = answer.map_err(|_| later(format!("{controller} does not answer a hello")))?;
        let answer = answer.map_err(later)?;
        let answer = answer.ok_or_else(|| later(format!("{controller} ended the link")))?;
        match decode(&answer) {
            Ok(ToScheduler::Welcome(hints)) => Ok((controller, hints, sender, receiver)),
            Ok(ToScheduler::Refused(reason)) => {
                Err(Ended::Refused(RemoteSchedulerError::Refused {
                    controller,
                    reason,
                }))
            }
            Ok(_) => Err(later(format!(
                "{controller} answered a hello with something else"
            ))),
            Err(error) => Err(later(format!("{controller} cannot be understood: {error}"))),
        }
    }

    /// Answers until the link ends; returns why it did.
    async fn answer(
        &mut self,
        mut scheduler: Box<dyn Scheduler>,
        mut sender: ControlSender,
        mut receiver: ControlReceiver,
    ) -> String {
        let mut elections = true;
        loop {
            let message = tokio::select! {
                message = receiver.recv() => message,
                changed = self.term.changed(), if elections => {
                    elections = changed.is_ok();
                    let term = *self.term.borrow_and_update();
                    match sender.send(&encode(&FromScheduler::Elected(term))).await {
                        Ok(()) => continue,
                        Err(error) => return error.to_string(),
                    }
                }
            };
            let message = match message {
                Ok(Some(message)) => message,
                Ok(None) => return "the controller ended it".to_owned(),
                Err(error) => return error.to_string(),
            };
            let (number, event, now) = match decode(&message) {
                Ok(ToScheduler::Consult { number, event, now }) => (number, event, now),
                Ok(_) => return "the controller said welcome twice".to_owned(),
                Err(error) => return format!("a message cannot be read: {error}"),
            };
            let mut plans = Vec::new();
            // Unwind safe: a scheduler that panicked is dropped.
            let asked = AssertUnwindSafe(|| scheduler.handle(&event, now, &mut plans));
            if catch_unwind(asked).is_err() {
                sender.close("the scheduler panicked");
                return "the scheduler panicked".to_owned();
            }
            let answer = encode(&FromScheduler::Plans { number, plans });
            if let Err(error) = sender.send(&answer).await {
                return error.to_string();
            }
        }
    }
}
