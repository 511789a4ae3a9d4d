//! The books of the cluster: which sequence is where, how far, with how many KV blocks, and which steps are under way.
//!
//! The frontend keeps a [`View`] to check plans against; a scheduler keeps one to plan from. Both feed theirs the same events and
//! accepted plans, so the two agree without a word between them. All maps are ordered: the same events give the same
//! decisions on every run.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use volley_transports::MicroBatch;

use crate::protocol::{
    AttentionCapacity, Membership, Now, PLANS_AHEAD, Refusal, RefusalReason, SchedulerEvent,
    SequenceId, StepDone, StepPlan, Submit, Work,
};

/// See the module.
#[derive(Debug, Default, Clone)]
pub struct View {
    workers: Vec<WorkerView>,
    /// Plans under way of each micro-batch, oldest first.
    in_flight: Vec<VecDeque<Vec<Planned>>>,
    sequences: BTreeMap<SequenceId, SequenceView>,
    waiting: BTreeSet<SequenceId>,
}

/// An attention worker in the books.
#[derive(Debug, Clone)]
pub struct WorkerView {
    /// Its limits.
    pub capacity: AttentionCapacity,
    /// KV blocks that no sequence holds.
    pub free_blocks: u32,
    /// Sequences whose KV cache it holds.
    pub sequences: BTreeSet<SequenceId>,
}

/// A sequence in the books.
#[derive(Debug, Clone)]
pub struct SequenceView {
    /// Tokens whose values will be known when the steps under way have ended, if it does not end before.
    pub length: u32,
    /// Tokens whose keys and values will then be in the cache.
    pub computed: u32,
    /// Its length never grows beyond this.
    pub limit: u32,
    /// KV blocks it holds.
    pub blocks: u32,
    /// The attention worker that holds them.
    pub worker: Option<u16>,
    /// Steps under way that it takes part in; all of the same micro-batch.
    pub in_flight: u8,
    /// Micro-batch of its latest step.
    pub micro_batch: Option<MicroBatch>,
    /// Who asks.
    pub tenant: Arc<str>,
    /// Larger is more urgent.
    pub priority: i32,
    /// When it arrived.
    pub arrived: Now,
    /// It has ended and leaves the books with its last step under way.
    ended: bool,
}

impl SequenceView {
    /// Tokens that could be computed next: the rest of the prompt, or 1 when decoding.
    pub fn pending(&self) -> u32 {
        self.length - self.computed
    }

    /// Whether it has nothing left to plan: only the outcome of its steps is awaited, or nothing at all.
    pub fn exhausted(&self) -> bool {
        self.ended || self.pending() == 0
    }
}

/// A part of a step under way.
#[derive(Debug, Clone, Copy)]
struct Planned {
    work: Work,
    /// Where its first token stands.
    start: u32,
}

/// An accepted piece of work with what the books know of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AcceptedWork {
    /// As planned.
    pub work: Work,
    /// Position of its first token.
    pub start: u32,
    /// Whether a token is sampled at its end.
    pub samples: bool,
    /// Whether this is the sequence's first work on this worker.
    pub admits: bool,
}

/// What became of a plan.
#[derive(Debug, Clone, Default)]
pub struct Accepted {
    /// The work to be done. Empty: there is no step.
    pub work: Vec<AcceptedWork>,
    /// Sequences taken off these workers.
    pub preempted: Vec<(SequenceId, u16)>,
    /// What was not accepted.
    pub refused: Vec<Refusal>,
}

impl View {
    /// The attention workers, by index.
    pub fn workers(&self) -> &[WorkerView] {
        &self.workers
    }

    /// Number of micro-batches.
    pub fn micro_batches(&self) -> u8 {
        self.in_flight.len() as u8
    }

    /// Steps of a micro-batch that are under way.
    pub fn plans_in_flight(&self, micro_batch: MicroBatch) -> u8 {
        self.in_flight
            .get(micro_batch.0 as usize)
            .map_or(0, |queue| queue.len() as u8)
    }

    /// A sequence that has not left the books.
    pub fn sequence(&self, id: SequenceId) -> Option<&SequenceView> {
        self.sequences.get(&id)
    }

    /// Sequences that hold no KV blocks, in order of arrival.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = SequenceId> + '_ {
        self.waiting.iter().copied()
    }

    /// Sequences in the books, in order of arrival.
    pub fn sequences(&self) -> impl ExactSizeIterator<Item = (SequenceId, &SequenceView)> + '_ {
        self.sequences.iter().map(|(&id, sequence)| (id, sequence))
    }

    /// Blocks that `sequence` needs beyond those it holds to compute `tokens` more on a worker with this block size.
    pub fn blocks_needed(sequence: &SequenceView, tokens: u32, block_tokens: u32) -> u32 {
        (sequence.computed + tokens)
            .div_ceil(block_tokens)
            .saturating_sub(sequence.blocks)
    }

    /// Takes a sequence in.
    pub fn submit(&mut self, submit: &Submit) {
        let id = submit.sequence;
        let (mut computed, mut blocks, mut worker) = (0, 0, None);
        let held = submit.held.and_then(|held| {
            let view = self.workers.get_mut(held.worker as usize)?;
            Some((held, view))
        });
        match held {
            Some((held, view)) => {
                blocks = held.computed.div_ceil(view.capacity.block_tokens);
                view.free_blocks = view.free_blocks.saturating_sub(blocks);
                view.sequences.insert(id);
                (computed, worker) = (held.computed, Some(held.worker));
            }
            None => {
                self.waiting.insert(id);
            }
        }
        self.sequences.insert(
            id,
            SequenceView {
                length: submit.length,
                computed,
                limit: submit.limit,
                blocks,
                worker,
                in_flight: 0,
                micro_batch: None,
                tenant: Arc::clone(&submit.tenant),
                priority: submit.priority,
                arrived: submit.arrived,
                ended: false,
            },
        );
    }

    /// Ends a sequence. With no step under way it leaves at once, and the worker that held its blocks is returned.
    pub fn end(&mut self, id: SequenceId) -> Option<(SequenceId, u16)> {
        let sequence = self.sequences.get_mut(&id)?;
        sequence.ended = true;
        self.waiting.remove(&id);
        self.leave_if_ended(id)
    }

    /// Enters what a scheduler is told. Its own plans it enters with [`View::plan`].
    pub fn hear(&mut self, event: &SchedulerEvent) {
        match event {
            SchedulerEvent::Submit(submit) => self.submit(submit),
            SchedulerEvent::Cancel(sequence) => drop(self.end(*sequence)),
            SchedulerEvent::StepDone(done) => drop(self.step_done(done)),
            SchedulerEvent::MembershipChanged(membership) => drop(self.membership(membership)),
            SchedulerEvent::Introduced(membership, sequences) => {
                self.introduce(membership, sequences);
            }
            // A cancellation overtook the plan: its event follows.
            SchedulerEvent::Refused(_) => {}
        }
    }

    /// Begins anew with these workers and sequences.
    pub fn introduce(&mut self, membership: &Membership, sequences: &[Submit]) {
        *self = View::default();
        self.membership(membership);
        sequences.iter().for_each(|submit| self.submit(submit));
    }

    /// Enters the workers there are now. What was on others leaves the books, also from steps under way; returns these sequences.
    pub fn membership(&mut self, membership: &Membership) -> BTreeSet<SequenceId> {
        let mut evicted = BTreeSet::new();
        let mut before = std::mem::take(&mut self.workers).into_iter();
        for &capacity in &membership.attention {
            let (kept, gone) = match before.next() {
                Some(worker) if worker.capacity == capacity => (Some(worker), None),
                other => (None, other),
            };
            evicted.extend(gone.into_iter().flat_map(|worker| worker.sequences));
            self.workers.push(kept.unwrap_or_else(|| WorkerView {
                capacity,
                free_blocks: if capacity.alive {
                    capacity.kv_blocks
                } else {
                    0
                },
                sequences: BTreeSet::new(),
            }));
        }
        evicted.extend(before.flat_map(|worker| worker.sequences));
        self.in_flight
            .resize(membership.micro_batches as usize, VecDeque::new());
        for step in self.in_flight.iter_mut().flatten() {
            step.retain(|part| !evicted.contains(&part.work.sequence));
        }
        evicted.iter().for_each(|id| {
            self.sequences.remove(id);
        });
        evicted
    }

    /// Checks a plan and enters what of it can be carried out.
    pub fn plan(&mut self, plan: &StepPlan) -> Accepted {
        let mut accepted = Accepted::default();
        let whole = |reason| Refusal {
            micro_batch: plan.micro_batch,
            sequence: None,
            reason,
        };
        let micro_batch = plan.micro_batch.0 as usize;
        match self.in_flight.get(micro_batch) {
            None => {
                let reason = RefusalReason::UnknownMicroBatch(self.micro_batches());
                accepted.refused.push(whole(reason));
                return accepted;
            }
            Some(queue) if queue.len() >= PLANS_AHEAD as usize => {
                accepted.refused.push(whole(RefusalReason::TooManyPlans));
                return accepted;
            }
            Some(_) => {}
        }
        let refusal = |id, reason| Refusal {
            micro_batch: plan.micro_batch,
            sequence: Some(id),
            reason,
        };

        for &id in &plan.preempt {
            match self.preempt(id) {
                Ok(worker) => accepted.preempted.push((id, worker)),
                Err(reason) => accepted.refused.push(refusal(id, reason)),
            }
        }
        let mut rows = vec![0u32; self.workers.len()];
        let mut named = BTreeSet::new();
        for &work in &plan.work {
            let result = if named.insert(work.sequence) {
                self.enter(plan.micro_batch, work, &mut rows)
            } else {
                Err(RefusalReason::NamedTwice)
            };
            match result {
                Ok(work) => accepted.work.push(work),
                Err(reason) => accepted.refused.push(refusal(work.sequence, reason)),
            }
        }
        if !accepted.work.is_empty() {
            let planned = accepted
                .work
                .iter()
                .map(|a| Planned {
                    work: a.work,
                    start: a.start,
                })
                .collect();
            self.in_flight[micro_batch].push_back(planned);
        }
        accepted
    }

    /// Enters the end of the oldest step under way of a micro-batch. Returns the sequences that left and where their blocks were.
    pub fn step_done(&mut self, done: &StepDone) -> Vec<(SequenceId, u16)> {
        let Some(planned) = self
            .in_flight
            .get_mut(done.micro_batch.0 as usize)
            .and_then(VecDeque::pop_front)
        else {
            debug_assert!(false, "the end of a step that was never planned: {done:?}");
            return Vec::new();
        };
        for outcome in &done.outcomes {
            if let Some(sequence) = self.sequences.get_mut(&outcome.sequence) {
                sequence.ended |= outcome.finished.is_some();
            }
        }
        let mut left = Vec::new();
        for part in planned {
            let id = part.work.sequence;
            if let Some(sequence) = self.sequences.get_mut(&id) {
                sequence.in_flight -= 1;
                left.extend(self.leave_if_ended(id));
            }
        }
        left
    }

    /// The oldest step under way of a micro-batch: work and the position where each part starts.
    pub fn oldest_step(&self, micro_batch: MicroBatch) -> impl Iterator<Item = (Work, u32)> + '_ {
        self.in_flight
            .get(micro_batch.0 as usize)
            .and_then(VecDeque::front)
            .into_iter()
            .flatten()
            .map(|part| (part.work, part.start))
    }

    /// Whether nothing is in the books.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    fn preempt(&mut self, id: SequenceId) -> Result<u16, RefusalReason> {
        let sequence = self
            .sequences
            .get_mut(&id)
            .ok_or(RefusalReason::UnknownSequence)?;
        if sequence.in_flight > 0 {
            return Err(RefusalReason::PreemptBusy);
        }
        let worker = sequence.worker.take().ok_or(RefusalReason::NotPlaced)?;
        let view = &mut self.workers[worker as usize];
        view.free_blocks += sequence.blocks;
        view.sequences.remove(&id);
        sequence.blocks = 0;
        sequence.computed = 0;
        sequence.micro_batch = None;
        self.waiting.insert(id);
        Ok(worker)
    }

    fn enter(
        &mut self,
        micro_batch: MicroBatch,
        work: Work,
        rows: &mut [u32],
    ) -> Result<AcceptedWork, RefusalReason> {
        let sequence = self
            .sequences
            .get_mut(&work.sequence)
            .filter(|sequence| !sequence.ended)
            .ok_or(RefusalReason::UnknownSequence)?;
        if sequence.in_flight > 0 && sequence.micro_batch != Some(micro_batch) {
            return Err(RefusalReason::Busy);
        }
        let worker = self
            .workers
            .get_mut(work.worker as usize)
            .filter(|worker| worker.capacity.alive)
            .ok_or(RefusalReason::NoSuchWorker(work.worker))?;
        if let Some(other) = sequence.worker.filter(|&other| other != work.worker) {
            return Err(RefusalReason::WrongWorker(other));
        }
        let left = sequence.pending();
        if work.tokens == 0 || work.tokens > left {
            return Err(RefusalReason::Tokens {
                asked: work.tokens,
                left,
            });
        }
        let row_sum = rows[work.worker as usize].saturating_add(work.tokens);
        if row_sum > worker.capacity.max_rows {
            let max_rows = worker.capacity.max_rows;
            return Err(RefusalReason::TooManyRows {
                rows: row_sum,
                max_rows,
            });
        }
        let needed = Self::blocks_needed(sequence, work.tokens, worker.capacity.block_tokens);
        if needed > worker.free_blocks {
            return Err(RefusalReason::NoBlocks {
                needed,
                free: worker.free_blocks,
            });
        }

        rows[work.worker as usize] = row_sum;
        worker.free_blocks -= needed;
        sequence.blocks += needed;
        let start = sequence.computed;
        sequence.computed += work.tokens;
        let samples = sequence.computed == sequence.length && sequence.length < sequence.limit;
        sequence.length += u32::from(samples);
        sequence.in_flight += 1;
        sequence.micro_batch = Some(micro_batch);
        let admits = sequence.worker.replace(work.worker).is_none();
        if admits {
            worker.sequences.insert(work.sequence);
            self.waiting.remove(&work.sequence);
        }
        Ok(AcceptedWork {
            work,
            start,
            samples,
            admits,
        })
    }

    fn leave_if_ended(&mut self, id: SequenceId) -> Option<(SequenceId, u16)> {
        let sequence = self.sequences.get(&id)?;
        if !sequence.ended || sequence.in_flight > 0 {
            return None;
        }
        let sequence = self.sequences.remove(&id)?;
        let worker = sequence.worker?;
        let view = &mut self.workers[worker as usize];
        view.free_blocks += sequence.blocks;
        view.sequences.remove(&id);
        Some((id, worker))
    }
}
