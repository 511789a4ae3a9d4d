//! Scheduling: which sequences compute what in the next step of which micro-batch.
//!
//! Three ways in, from little to all. A [`Policy`] picks one micro-batch's next step from the books, and [`PolicyScheduler`] does the rest. A
//! [`Scheduler`] answers every event itself. An actix actor that handles [`Consult`] is a scheduler without using anything of ours.

mod actor;
mod batching;
mod order;
mod pace;
mod view;

pub use actor::{
    Consult, SchedulerActor, SchedulerHandle, StartScheduler, resident_scheduler, scheduler,
};
pub use batching::Batching;
pub use order::{
    Arrival, EarliestDeadline, FairShare, Order, SloClass, Standing, TenantWeights, WeightError,
};
pub use pace::Pace;
pub use view::{Accepted, AcceptedWork, SequenceView, View, WorkerView};

use volley_transports::MicroBatch;

use crate::protocol::{Now, PLANS_AHEAD, SchedulerEvent, StepPlan};

/// First come, first served, with nothing else: the policy of a cluster that is told no other.
pub type FirstCome = Batching<Arrival>;

/// Plans steps in answer to events. Pure: no clock, no threads, no I/O; see the protocol in [`crate::protocol`].
pub trait Scheduler: Send {
    /// Takes one event in and adds any number of plans to `plans`.
    fn handle(&mut self, event: &SchedulerEvent, now: Now, plans: &mut Vec<StepPlan>);
}

impl<S: Scheduler + ?Sized> Scheduler for Box<S> {
    fn handle(&mut self, event: &SchedulerEvent, now: Now, plans: &mut Vec<StepPlan>) {
        (**self).handle(event, now, plans);
    }
}

/// Picks the next step of one micro-batch.
pub trait Policy: Send {
    /// Hears of an event before the books have entered it.
    fn observe(&mut self, _event: &SchedulerEvent, _view: &View) {}

    /// The work of the next step of `micro_batch`, from the books. An empty plan means: nothing to do now.
    fn plan(&mut self, view: &View, micro_batch: MicroBatch, now: Now) -> StepPlan;
}

/// A scheduler around a [`Policy`]: keeps the books and asks the policy whenever a micro-batch can take another plan.
#[derive(Debug, Default)]
pub struct PolicyScheduler<P> {
    policy: P,
    view: View,
}

impl<P: Policy> PolicyScheduler<P> {
    /// A scheduler with empty books; the first membership event fills them.
    pub fn new(policy: P) -> Self {
        PolicyScheduler {
            policy,
            view: View::default(),
        }
    }

    /// The books.
    pub fn view(&self) -> &View {
        &self.view
    }
}

impl<P: Policy> Scheduler for PolicyScheduler<P> {
    fn handle(&mut self, event: &SchedulerEvent, now: Now, plans: &mut Vec<StepPlan>) {
        self.policy.observe(event, &self.view);
        self.view.hear(event);
        // Running steps first, plans ahead second: an idle micro-batch is the more urgent one.
        for depth in 0..PLANS_AHEAD {
            for index in 0..self.view.micro_batches() {
                let micro_batch = MicroBatch(index);
                if self.view.plans_in_flight(micro_batch) > depth {
                    continue;
                }
                let plan = self.policy.plan(&self.view, micro_batch, now);
                let accepted = self.view.plan(&plan);
                debug_assert!(accepted.refused.is_empty(), "{:?}", accepted.refused);
                if !accepted.work.is_empty() || !accepted.preempted.is_empty() {
                    plans.push(plan);
                }
            }
        }
    }
}
