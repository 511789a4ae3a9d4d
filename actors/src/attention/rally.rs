//! The attention worker's logic: which micro-batch is next, and where the time went. Pure: events and the time in, tasks out.
//!
//! A micro-batch flies back and forth: computed here, then with the experts, layer by layer. Micro-batches are ordered by nothing but their
//! own dependency: whichever has its rows back is computed next, first come first served. This is the ping-pong of the paper (section 4.1): with
//! enough micro-batches in flight one of them is always ready.

use std::collections::VecDeque;
use std::time::Duration;

use volley_transports::{Layer, MicroBatch, Step, Times};

use crate::protocol::{AttentionStep, Now, PLANS_AHEAD, StepTiming};

/// See the module.
#[derive(Debug)]
pub struct Rally {
    micro_batches: Vec<Flight>,
    /// Micro-batches whose rows are here, in order of their coming.
    ready: VecDeque<MicroBatch>,
}

/// One micro-batch.
#[derive(Debug, Default)]
struct Flight {
    /// The running step, then those planned behind it.
    steps: VecDeque<AttentionStep>,
    phase: Phase,
    began: Now,
    timing: StepTiming,
}

#[derive(Debug, Default, Clone, Copy, PartialEq)]
enum Phase {
    /// No step.
    #[default]
    Idle,
    /// To be computed here from `layer` on, since then.
    Ready { layer: Layer, since: Now },
    /// Being computed here.
    Running { since: Now },
    /// With the experts of `layer`, since then.
    Away { layer: Layer, since: Now },
}

/// What is to be computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Task {
    /// The micro-batch.
    pub micro_batch: MicroBatch,
    /// The layer whose attention comes next. Above the last layer: the head.
    pub layer: Layer,
    /// Whether the step begins: there is nothing to combine yet.
    pub begins: bool,
}

/// A micro-batch that waits for experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Wait {
    /// The micro-batch.
    pub micro_batch: MicroBatch,
    /// Its step.
    pub step: Step,
    /// The layer whose experts it waits for.
    pub layer: Layer,
    /// For how long.
    pub age: Duration,
}

impl Rally {
    /// With this many micro-batches, none of them taking a step.
    pub fn new(micro_batches: u8) -> Self {
        let flights = (0..micro_batches).map(|_| Flight {
            steps: VecDeque::with_capacity(PLANS_AHEAD as usize),
            ..Flight::default()
        });
        Rally {
            micro_batches: flights.collect(),
            ready: VecDeque::with_capacity(micro_batches as usize),
        }
    }

    /// Takes a step in; it begins when the previous one of its micro-batch has ended. Returns false if there is no such micro-batch.
    #[must_use]
    pub fn open(&mut self, step: AttentionStep, now: Now) -> bool {
        let micro_batch = step.micro_batch;
        let Some(flight) = self.micro_batches.get_mut(micro_batch.0 as usize) else {
            return false;
        };
        flight.steps.push_back(step);
        self.begin_next(micro_batch, now);
        true
    }

    /// The next task, if there is one. The caller performs it and reports its end with [`Rally::dispatched`] or [`Rally::finished`].
    pub fn next(&mut self, now: Now) -> Option<Task> {
        let micro_batch = self.ready.pop_front()?;
        let flight = self.flight(micro_batch);
        let Phase::Ready { layer, since } = flight.phase else {
            debug_assert!(
                false,
                "{micro_batch} was queued in phase {:?}",
                flight.phase
            );
            return None;
        };
        let begins = layer == Layer(0); // layer 0 is reached in no other way
        if begins {
            flight.began = now;
            flight.timing = StepTiming::default();
        } else {
            flight.timing.ready += now.saturating_sub(since);
        }
        flight.phase = Phase::Running { since: now };
        Some(Task {
            micro_batch,
            layer,
            begins,
        })
    }

    /// The running step of a micro-batch.
    pub fn step(&self, micro_batch: MicroBatch) -> Option<&AttentionStep> {
        self.micro_batches
            .get(micro_batch.0 as usize)?
            .steps
            .front()
    }

    /// A task ended with the rows of `layer` on their way to the experts.
    pub fn dispatched(&mut self, micro_batch: MicroBatch, layer: Layer, now: Now) {
        let flight = self.flight(micro_batch);
        flight.computed(now);
        flight.phase = Phase::Away { layer, since: now };
    }

    /// How long a micro-batch has been with the experts; none if it is not.
    pub fn away(&self, micro_batch: MicroBatch, now: Now) -> Option<Duration> {
        match self.micro_batches.get(micro_batch.0 as usize)?.phase {
            Phase::Away { since, .. } => Some(now.saturating_sub(since)),
            _ => None,
        }
    }

    /// All outputs of the layer under way were in at `now`, which may have passed unseen; `slowest` are the times of the expert worker that took longest.
    pub fn answered(&mut self, micro_batch: MicroBatch, slowest: Times, now: Now) {
        let flight = self.flight(micro_batch);
        let Phase::Away { layer, since } = flight.phase else {
            debug_assert!(
                false,
                "{micro_batch} was answered in phase {:?}",
                flight.phase
            );
            return;
        };
        let compute = Duration::from_nanos(slowest.compute_ns);
        let queue = Duration::from_nanos(slowest.queued_ns);
        flight.timing.expert += compute;
        flight.timing.expert_queue += queue;
        flight.timing.network += now.saturating_sub(since).saturating_sub(compute + queue);
        flight.phase = Phase::Ready {
            layer: Layer(layer.0 + 1),
            since: now,
        };
        self.ready.push_back(micro_batch);
    }

    /// A task ended with the step's last token. The micro-batch begins its next step if one is planned.
    pub fn finished(
        &mut self,
        micro_batch: MicroBatch,
        rows: u32,
        now: Now,
    ) -> Option<(AttentionStep, StepTiming)> {
        let flight = self.flight(micro_batch);
        flight.computed(now);
        flight.timing.total = now.saturating_sub(flight.began);
        flight.timing.rows = rows;
        flight.phase = Phase::Idle;
        let ended = flight.steps.pop_front().map(|step| (step, flight.timing));
        self.begin_next(micro_batch, now);
        ended
    }

    /// Micro-batches that have waited for experts for longer than `limit`.
    pub fn overdue(&self, now: Now, limit: Duration) -> impl Iterator<Item = Wait> + '_ {
        self.waits(now).filter(move |wait| wait.age > limit)
    }

    /// Every micro-batch that waits for experts.
    pub fn waits(&self, now: Now) -> impl Iterator<Item = Wait> + '_ {
        self.micro_batches
            .iter()
            .zip(0..)
            .filter_map(move |(flight, index)| match flight.phase {
                Phase::Away { layer, since } => Some(Wait {
                    micro_batch: MicroBatch(index),
                    step: flight.steps.front()?.step,
                    layer,
                    age: now.saturating_sub(since),
                }),
                _ => None,
            })
    }

    /// Forgets every step: a new epoch begins.
    pub fn reset(&mut self) {
        self.ready.clear();
        for flight in &mut self.micro_batches {
            flight.steps.clear();
            flight.phase = Phase::Idle;
        }
    }

    fn begin_next(&mut self, micro_batch: MicroBatch, now: Now) {
        let flight = self.flight(micro_batch);
        if flight.phase == Phase::Idle && !flight.steps.is_empty() {
            flight.phase = Phase::Ready {
                layer: Layer(0),
                since: now,
            };
            self.ready.push_back(micro_batch);
        }
    }

    fn flight(&mut self, micro_batch: MicroBatch) -> &mut Flight {
        &mut self.micro_batches[micro_batch.0 as usize]
    }
}

impl Flight {
    fn computed(&mut self, now: Now) {
        if let Phase::Running { since } = self.phase {
            self.timing.attention += now.saturating_sub(since);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use volley_transports::{Epoch, Participants};

    use super::*;

    fn step(micro_batch: u8, step: u64) -> AttentionStep {
        AttentionStep {
            epoch: Epoch(0),
            micro_batch: MicroBatch(micro_batch),
            step: Step(step),
            participants: Arc::new(Participants::all(1)),
            work: Vec::new(),
        }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn times(queued: u64, compute: u64) -> Times {
        Times {
            queued_ns: queued * 1_000_000,
            compute_ns: compute * 1_000_000,
        }
    }

    #[test]
    fn two_micro_batches_alternate_and_time_is_attributed() {
        let mut rally = Rally::new(2);
        assert!(rally.open(step(0, 0), ms(0)) && rally.open(step(1, 1), ms(0)));
        assert!(!rally.open(step(2, 2), ms(0)), "there is no micro-batch 2");

        let first = rally.next(ms(0)).unwrap();
        assert_eq!(
            first,
            Task {
                micro_batch: MicroBatch(0),
                layer: Layer(0),
                begins: true
            }
        );
        rally.dispatched(MicroBatch(0), Layer(0), ms(10));
        let second = rally.next(ms(10)).unwrap();
        assert_eq!((second.micro_batch, second.begins), (MicroBatch(1), true));
        // Micro-batch 0 is back (1 ms queued, 5 ms computed, 2 ms on the way) while 1 is being computed.
        rally.answered(MicroBatch(0), times(1, 5), ms(18));
        rally.dispatched(MicroBatch(1), Layer(0), ms(20));
        let third = rally.next(ms(20)).unwrap();
        assert_eq!(
            third,
            Task {
                micro_batch: MicroBatch(0),
                layer: Layer(1),
                begins: false
            }
        );
        assert_eq!(rally.next(ms(20)), None);
        assert_eq!(
            rally.waits(ms(25)).collect::<Vec<_>>(),
            [Wait {
                micro_batch: MicroBatch(1),
                step: Step(1),
                layer: Layer(0),
                age: ms(5),
            }]
        );

        let (ended, timing) = rally.finished(MicroBatch(0), 3, ms(24)).unwrap();
        assert_eq!(ended.step, Step(0));
        let expected = StepTiming {
            total: ms(24),
            attention: ms(14),
            expert: ms(5),
            expert_queue: ms(1),
            network: ms(2),
            ready: ms(2),
            rows: 3,
        };
        assert_eq!(timing, expected);
    }

    #[test]
    fn a_planned_step_begins_when_the_running_one_ends_and_reset_forgets_both() {
        let mut rally = Rally::new(1);
        assert!(rally.open(step(0, 0), ms(0)) && rally.open(step(0, 1), ms(0)));
        assert_eq!(rally.next(ms(0)).unwrap().layer, Layer(0));
        assert_eq!(
            rally.next(ms(0)),
            None,
            "one step of a micro-batch at a time"
        );
        rally.finished(MicroBatch(0), 1, ms(1));
        assert_eq!(rally.step(MicroBatch(0)).unwrap().step, Step(1));
        assert!(rally.next(ms(1)).unwrap().begins);
        rally.reset();
        assert_eq!((rally.next(ms(2)), rally.waits(ms(2)).count()), (None, 0));
        assert!(rally.open(step(0, 2), ms(2)));
        assert!(rally.next(ms(2)).unwrap().begins);
    }
}
