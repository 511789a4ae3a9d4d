//! A scheduling actor of one's own: the shortest request first.
//!
//! A scheduler is an actor that handles [`Consult`]: it is told what happened and answers with the steps it wants taken. This one keeps the
//! cluster's books in a [`View`], which knows what each worker holds and what can be planned, and decides one thing: who is first.

use actix::{Actor, Arbiter, Context, Handler, MessageResult};
use volley_actors::protocol::{Now, PLANS_AHEAD, SchedulerEvent, SequenceId, StepPlan, Work};
use volley_actors::{Consult, Scheduler, SequenceView, StartScheduler, View};
use volley_transports::MicroBatch;

/// Plans the sequences with the fewest tokens left to compute first. Good for the mean wait; a long request may starve.
#[derive(Debug, Default)]
pub struct ShortestFirst {
    view: View,
}

/// Hand this to [`volley_actors::Cluster::start`]. It is called again if the actor should ever die.
pub fn start() -> StartScheduler {
    Box::new(|| {
        // On a thread of its own, so that whatever it does holds nobody up.
        let arbiter = Arbiter::new().handle();
        ShortestFirst::start_in_arbiter(&arbiter, |_| ShortestFirst::default()).recipient()
    })
}

impl Actor for ShortestFirst {
    type Context = Context<Self>;
}

impl Handler<Consult> for ShortestFirst {
    type Result = MessageResult<Consult>;

    fn handle(&mut self, consult: Consult, _: &mut Context<Self>) -> Self::Result {
        let mut plans = Vec::new();
        Scheduler::handle(self, &consult.event, consult.now, &mut plans);
        MessageResult(plans)
    }
}

/// The logic of the actor, without the actor: what `src/bin/simulate.rs` tries in virtual time.
impl Scheduler for ShortestFirst {
    fn handle(&mut self, event: &SchedulerEvent, _: Now, plans: &mut Vec<StepPlan>) {
        self.view.hear(event);
        for _ in 0..PLANS_AHEAD {
            for micro_batch in (0..self.view.micro_batches()).map(MicroBatch) {
                if self.view.plans_in_flight(micro_batch) < PLANS_AHEAD {
                    let plan = self.plan(micro_batch);
                    // Enters the plan in our books, as the frontend will in its own.
                    let accepted = self.view.plan(&plan);
                    if !accepted.work.is_empty() || !accepted.preempted.is_empty() {
                        plans.push(plan);
                    }
                }
            }
        }
    }
}

impl ShortestFirst {
    /// The next step of a micro-batch.
    fn plan(&self, micro_batch: MicroBatch) -> StepPlan {
        let mut candidates: Vec<(SequenceId, &SequenceView)> = self
            .view
            .sequences()
            .filter(|(_, s)| !s.exhausted())
            .filter(|(_, s)| s.in_flight == 0 || s.micro_batch == Some(micro_batch))
            .collect();
        candidates.sort_by_key(|(id, s)| (s.limit - s.computed, *id));

        let workers = self.view.workers();
        let mut rows: Vec<u32> = workers.iter().map(|w| w.capacity.max_rows).collect();
        let mut blocks: Vec<u32> = workers.iter().map(|w| w.free_blocks).collect();
        let mut plan = StepPlan {
            micro_batch,
            work: Vec::new(),
            preempt: Vec::new(),
        };
        for (sequence, s) in candidates {
            // A sequence stays with its KV cache; a new one goes where most of the cache is free.
            let roomiest = || (0..workers.len()).max_by_key(|&w| (rows[w] > 0, blocks[w]));
            let Some(worker) = s.worker.map(usize::from).or_else(roomiest) else {
                continue;
            };
            let tokens = s.pending().min(rows[worker]);
            let needed = View::blocks_needed(s, tokens, workers[worker].capacity.block_tokens);
            if tokens == 0 || needed > blocks[worker] || !workers[worker].capacity.alive {
                continue;
            }
            rows[worker] -= tokens;
            blocks[worker] -= needed;
            plan.work.push(Work {
                sequence,
                worker: worker as u16,
                tokens,
            });
        }
        if plan.work.is_empty() {
            plan.preempt.extend(self.longest_if_stuck());
        }
        plan
    }

    /// With nothing under way and nothing that fits, the longest sequence gives its cache back. It waits and loses nothing.
    fn longest_if_stuck(&self) -> Option<SequenceId> {
        let idle =
            (0..self.view.micro_batches()).all(|mb| self.view.plans_in_flight(MicroBatch(mb)) == 0);
        let placed = self
            .view
            .sequences()
            .filter(|(_, s)| s.worker.is_some() && s.in_flight == 0);
        placed
            .max_by_key(|(_, s)| s.limit - s.computed)
            .map(|(id, _)| id)
            .filter(|_| idle)
    }
}
