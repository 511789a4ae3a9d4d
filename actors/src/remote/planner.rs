//! The controller's side of a scheduler process: an actor that stands for it, as for any scheduler, and the link behind.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use actix::prelude::*;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use volley_transports::quic::{ControlLink, ControlReceiver, ControlSender};

use super::message::{FromScheduler, ToScheduler, decode, encode};
use super::scheduler::SchedulingHints;
use crate::frontend::{Frontend, SchedulerNews};
use crate::protocol::StepPlan;
use crate::scheduler::Consult;

/// A scheduler that has called has this long to say hello.
const HELLO_DEADLINE: Duration = Duration::from_secs(5);
/// Longest name; it stands in logs.
const NAME_MAX: usize = 100;

/// Numbers of scheduler processes, in order of arrival.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// Serves a link from its hello to its end.
pub(super) async fn serve(link: ControlLink, frontend: Addr<Frontend>, hints: SchedulingHints) {
    let peer = link.peer().clone();
    let (mut sender, mut receiver) = link.split();
    let (name, term) = match hello(&mut receiver).await {
        Ok(hello) => hello,
        Err(reason) => {
            tracing::warn!(
                "the scheduler {} at {} is refused: {reason}",
                peer.name,
                peer.address
            );
            if sender
                .send(&encode(&ToScheduler::Refused(reason)))
                .await
                .is_ok()
            {
                let _ = timeout(HELLO_DEADLINE, sender.finish()).await;
            }
            return;
        }
    };
    if sender
        .send(&encode(&ToScheduler::Welcome(hints)))
        .await
        .is_err()
    {
        return;
    }
    let id = NEXT.fetch_add(1, Ordering::Relaxed);
    tracing::info!("the scheduler {name} offers itself from {}", peer.address);
    let (questions, queue) = mpsc::unbounded_channel();
    let waiting = Arc::new(Waiting::default());
    let planner = Planner {
        questions,
        next: 0,
        waiting: Arc::clone(&waiting),
    };
    let (presence, unwanted) = oneshot::channel();
    frontend.do_send(SchedulerNews::Joined(
        id,
        name.clone(),
        term,
        planner,
        presence,
    ));
    let reason = tokio::select! {
        reason = listen(id, &frontend, &waiting, &mut receiver) => reason,
        reason = write(&mut sender, queue) => reason,
        // A sender that is dropped says the same.
        _ = unwanted => "it was late".to_owned(),
    };
    tracing::warn!("the scheduler {name} is gone: {reason}");
    frontend.do_send(SchedulerNews::Left(id));
    waiting.expect(None);
    sender.close("the controller has another scheduler");
}

/// The first message, checked.
async fn hello(receiver: &mut ControlReceiver) -> Result<(String, Option<u64>), String> {
    let message = timeout(HELLO_DEADLINE, receiver.recv()).await;
    let message = message.map_err(|_| format!("it said nothing within {HELLO_DEADLINE:?}"))?;
    let message = message.map_err(|error| error.to_string())?;
    let message = message.ok_or("it ended the link at once")?;
    match decode(&message) {
        Ok(FromScheduler::Hello { volley, name, term }) => {
            let ours = env!("CARGO_PKG_VERSION");
            if volley != ours {
                return Err(format!(
                    "it is of version {volley}, and the controller of {ours}"
                ));
            }
            if name.len() > NAME_MAX || name.chars().any(char::is_control) {
                return Err(format!(
                    "its name has control characters or is longer than {NAME_MAX} bytes"
                ));
            }
            Ok((name, term))
        }
        Ok(_) => Err("its first message is not a hello".to_owned()),
        Err(error) => Err(format!("its first message cannot be read: {error}")),
    }
}

/// Carries answers to the actor until the link ends; returns why it did.
async fn listen(
    id: u64,
    frontend: &Addr<Frontend>,
    waiting: &Waiting,
    receiver: &mut ControlReceiver,
) -> String {
    loop {
        let message = match receiver.recv().await {
            Ok(Some(message)) => message,
            Ok(None) => return "it ended its link".to_owned(),
            Err(error) => return error.to_string(),
        };
        match decode(&message) {
            Ok(FromScheduler::Plans { number, plans }) => waiting.answered(number, plans),
            Ok(FromScheduler::Elected(term)) => {
                frontend.do_send(SchedulerNews::Elected(id, term));
            }
            Ok(FromScheduler::Hello { .. }) => return "it said hello twice".to_owned(),
            Err(error) => return format!("a message cannot be read: {error}"),
        }
    }
}

/// Carries questions to the link until the frontend has dropped its handle, or the link has ended.
async fn write(
    sender: &mut ControlSender,
    mut queue: mpsc::UnboundedReceiver<ToScheduler>,
) -> String {
    while let Some(message) = queue.recv().await {
        if let Err(error) = sender.send(&encode(&message)).await {
            return error.to_string();
        }
    }
    "it is not asked any more".to_owned()
}

/// The one question that is under way, and who waits for its answer.
#[derive(Default)]
struct Waiting(Mutex<Option<(u64, oneshot::Sender<Vec<StepPlan>>)>>);

impl Waiting {
    /// Waits for another answer. Whoever waited for the last one is told that none will come.
    fn expect(&self, question: Option<(u64, oneshot::Sender<Vec<StepPlan>>)>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = question;
    }

    fn answered(&self, number: u64, plans: Vec<StepPlan>) {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // An answer to an older question is nobody's any more.
        if let Some((_, answer)) = waiting.take_if(|(expected, _)| *expected == number) {
            let _ = answer.send(plans);
        }
    }
}

/// Stands for a scheduler process: questions go over the link.
pub(crate) struct Planner {
    questions: mpsc::UnboundedSender<ToScheduler>,
    next: u64,
    waiting: Arc<Waiting>,
}

impl Actor for Planner {
    type Context = Context<Self>;
}

impl Handler<Consult> for Planner {
    type Result = ResponseFuture<Vec<StepPlan>>;

    fn handle(&mut self, consult: Consult, _: &mut Self::Context) -> Self::Result {
        let Consult { event, now } = consult;
        let number = self.next;
        self.next += 1;
        let (answer, answered) = oneshot::channel();
        self.waiting.expect(Some((number, answer)));
        let _ = self
            .questions
            .send(ToScheduler::Consult { number, event, now });
        // No answer is an answer without plans: the frontend hears that the link has ended, and turns to another.
        Box::pin(async move { answered.await.unwrap_or_default() })
    }
}
