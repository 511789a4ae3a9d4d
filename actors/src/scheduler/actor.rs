//! A scheduler as an actor: one message, one answer.

use actix::{Actor, Arbiter, Context, Handler, Message, MessageResult, Recipient};

use super::Scheduler;
use crate::protocol::{Now, SchedulerEvent, StepPlan};

/// Tells a scheduler what happened; the answer is the steps it wants taken. See [`crate::protocol`] for the guarantees.
#[derive(Debug, Clone, Message)]
#[rtype(result = "Vec<StepPlan>")]
pub struct Consult {
    /// What happened.
    pub event: SchedulerEvent,
    /// When.
    pub now: Now,
}

/// How the frontend reaches a scheduler.
pub type SchedulerHandle = Recipient<Consult>;

/// Starts a scheduler, again each time the last one died. Called within the actor system.
pub type StartScheduler = Box<dyn Fn() -> SchedulerHandle + Send>;

/// The shell around a [`Scheduler`].
#[derive(Debug)]
pub struct SchedulerActor<S>(pub S);

impl<S: Scheduler + Unpin + 'static> Actor for SchedulerActor<S> {
    type Context = Context<Self>;
}

impl<S: Scheduler + Unpin + 'static> Handler<Consult> for SchedulerActor<S> {
    type Result = MessageResult<Consult>;

    fn handle(&mut self, consult: Consult, _: &mut Context<Self>) -> Self::Result {
        let mut plans = Vec::new();
        self.0.handle(&consult.event, consult.now, &mut plans);
        MessageResult(plans)
    }
}

/// Runs a scheduler made by `make` on the frontend's own thread, which saves two changes of threads for each event: for one that is quick and does not panic, as those
/// that are shipped.
pub fn resident_scheduler<S: Scheduler + Unpin + 'static>(
    make: impl Fn() -> S + Send + 'static,
) -> StartScheduler {
    Box::new(move || SchedulerActor(make()).start().recipient())
}

/// Runs a scheduler made by `make` on a thread of its own, so that a slow or panicking one stands in nobody's way.
pub fn scheduler<S: Scheduler + Unpin + 'static>(
    make: impl Fn() -> S + Clone + Send + 'static,
) -> StartScheduler {
    Box::new(move || {
        let make = make.clone();
        let arbiter = Arbiter::new().handle();
        SchedulerActor::start_in_arbiter(&arbiter, move |_| SchedulerActor(make())).recipient()
    })
}
