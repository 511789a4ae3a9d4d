//! Continuous batching with chunked prefill: the machinery that the shipped policies share, whoever comes first.
//!
//! A step takes the decoding sequences of its micro-batch first, then fills up to the worker's row limit with chunks of prompts, in the
//! policy's [`Order`]. New sequences go to the attention worker with the most free KV blocks.
//!
//! A worker opens a further micro-batch only when all of them can have [`Batching::fill`] rows: experts read their weights once for each micro-batch, so
//! one of few rows costs about as much as one of many. Rows are spread evenly over those that are open.
//!
//! When KV blocks run out, standing decides. The first sequence that lacks a block makes its worker *short*: those behind it get no further work there,
//! so that their steps run out, and are then preempted, the last first, until the one before them fits. The first sequence of a worker is thus never
//! stuck, and as standings do not change and those of newcomers grow with time, every sequence becomes the first.
//!
//! With a [`Pace`], steps are composed to a time as well: see there.

use volley_transports::MicroBatch;

use super::{Arrival, Order, Pace, Policy, SequenceView, Standing, View};
use crate::protocol::{Now, SchedulerEvent, SequenceId, StepPlan, Work};

/// See the module.
#[derive(Debug, Clone)]
pub struct Batching<O> {
    /// Prompt tokens a step computes at most on one worker beside its decoding sequences. Long prompts in smaller chunks keep the time
    /// between other sequences' tokens short.
    pub prefill_tokens: u32,
    /// Rows (tokens of one step) that a micro-batch should have, if there is to be more than one.
    pub fill: u32,
    order: O,
    pace: Option<Pace>,
    /// By worker: the first sequence that lacked a block when last planned.
    short: Vec<Option<Standing>>,
}

impl<O: Order> Batching<O> {
    /// In this order, with at most `prefill_tokens` of prompts in one worker's step, and `fill` rows in a micro-batch before there is another.
    pub fn by(order: O, prefill_tokens: u32, fill: u32) -> Self {
        Batching {
            prefill_tokens: prefill_tokens.max(1),
            fill: fill.max(1),
            order,
            pace: None,
            short: Vec::new(),
        }
    }

    /// Composes steps to a time.
    #[must_use]
    pub fn paced(self, pace: Pace) -> Self {
        Batching {
            pace: Some(pace),
            ..self
        }
    }
}

impl super::FirstCome {
    /// First come, first served, with at most `prefill_tokens` of prompts in one worker's step, and `fill` rows in a micro-batch before there is another.
    pub fn new(prefill_tokens: u32, fill: u32) -> Self {
        Batching::by(Arrival, prefill_tokens, fill)
    }
}

/// The plan being made, with what it has used up so far.
struct Draft<'a> {
    view: &'a View,
    plan: StepPlan,
    /// By worker.
    rows: Vec<u32>,
    prefill: Vec<u32>,
    free_blocks: Vec<u32>,
    /// What the step will read and compute on each worker, in the units of [`Pace`].
    effort: Vec<u64>,
}

impl<O: Order> Policy for Batching<O> {
    fn observe(&mut self, event: &SchedulerEvent, view: &View) {
        if let (Some(pace), SchedulerEvent::StepDone(done)) = (&mut self.pace, event) {
            pace.observe(done, view);
        }
    }

    fn plan(&mut self, view: &View, micro_batch: MicroBatch, now: Now) -> StepPlan {
        let workers = view.workers();
        self.short.resize(workers.len(), None);
        for (index, short) in self.short.iter_mut().enumerate() {
            // The mark of a sequence that has left the worker is stale.
            if short.is_some_and(|short| !workers[index].sequences.contains(&short.sequence)) {
                *short = None;
            }
        }
        let mut draft = Draft {
            view,
            plan: StepPlan {
                micro_batch,
                work: Vec::new(),
                preempt: Vec::new(),
            },
            rows: vec![0; workers.len()],
            prefill: vec![self.prefill_tokens; workers.len()],
            free_blocks: workers.iter().map(|worker| worker.free_blocks).collect(),
            effort: vec![0; workers.len()],
        };
        let waiting = self.waiting(view);
        let shares: Vec<u32> = (0..workers.len())
            .map(|worker| self.share(view, worker, waiting, micro_batch))
            .collect();
        // Rows of each worker that this micro-batch has or may have.
        let mut here = vec![0; workers.len()];
        for index in 0..workers.len() {
            let line = self.standings(view, index);
            // Decoding sequences before prompts, by standing within each.
            for decoding in [true, false] {
                for &standing in &line {
                    let Some(sequence) = view.sequence(standing.sequence) else {
                        continue;
                    };
                    if sequence.exhausted() || (sequence.pending() == 1) != decoding {
                        continue;
                    }
                    let ours = sequence.micro_batch == Some(micro_batch);
                    // A sequence without a step under way may move to a micro-batch that has fewer than its share.
                    let free = sequence.in_flight == 0;
                    if !(ours || free) || here[index] >= shares[index] {
                        continue;
                    }
                    if self.extend(&mut draft, index, standing, sequence) {
                        here[index] += self.weight(sequence);
                    }
                }
            }
        }
        self.admit(&mut draft, &shares, &mut here, now);
        for work in &draft.plan.work {
            if let Some(sequence) = view.sequence(work.sequence) {
                self.order.planned(sequence, work.tokens);
            }
        }
        draft.plan
    }
}

impl<O: Order> Batching<O> {
    /// The sequences of a worker, the first first.
    fn standings(&self, view: &View, worker: usize) -> Vec<Standing> {
        let sequences = view.workers()[worker].sequences.iter();
        let mut line: Vec<Standing> = sequences
            .filter_map(|&id| Some(self.order.standing(id, view.sequence(id)?)))
            .collect();
        line.sort_unstable();
        line
    }

    /// Rows that a sequence will bring to its next step.
    fn weight(&self, sequence: &SequenceView) -> u32 {
        sequence.pending().clamp(1, self.prefill_tokens)
    }

    /// Rows that sequences without a place will bring to each worker, as far as it is worth knowing.
    fn waiting(&self, view: &View) -> u32 {
        // What fills every micro-batch is enough to know.
        let enough = self.fill.saturating_mul(micro_batches(view));
        let alive = view.workers().iter().filter(|w| w.capacity.alive).count();
        let first = view.waiting().take(enough as usize);
        self.weights(view, first).div_ceil(alive.max(1) as u32)
    }

    /// Rows of one worker that a micro-batch should have.
    fn share(&self, view: &View, worker: usize, waiting: u32, micro_batch: MicroBatch) -> u32 {
        let running = view.workers()[worker].sequences.iter().copied();
        let rows = self.weights(view, running).saturating_add(waiting);
        let open = (rows / self.fill).clamp(1, micro_batches(view));
        if u32::from(micro_batch.0) < open {
            rows.div_ceil(open)
        } else {
            0
        }
    }

    fn weights(&self, view: &View, ids: impl Iterator<Item = SequenceId>) -> u32 {
        ids.filter_map(|id| view.sequence(id))
            .map(|sequence| self.weight(sequence))
            .fold(0, u32::saturating_add)
    }

    /// Adds a running sequence's next tokens to the draft, making room by preemption if it may. Returns whether it was added.
    fn extend(
        &mut self,
        draft: &mut Draft<'_>,
        worker: usize,
        standing: Standing,
        sequence: &SequenceView,
    ) -> bool {
        let id = standing.sequence;
        if draft.plan.preempt.contains(&id)
            || self.short[worker].is_some_and(|short| standing > short)
        {
            return false;
        }
        let decoding = sequence.pending() == 1;
        let tokens = if decoding {
            // Those that decode are always served: leaving one out would only make it later.
            draft.room(worker).min(1)
        } else {
            self.chunk(draft, worker, sequence)
        };
        if tokens == 0 {
            return false;
        }
        let capacity = draft.view.workers()[worker].capacity;
        let needed = View::blocks_needed(sequence, tokens, capacity.block_tokens);
        while needed > draft.free_blocks[worker] {
            let Some(victim) = self.victim(draft, worker, standing) else {
                self.short[worker] = Some(standing);
                return false;
            };
            draft.plan.preempt.push(victim);
            draft.free_blocks[worker] += draft.view.sequence(victim).map_or(0, |v| v.blocks);
        }
        if self.short[worker] == Some(standing) {
            self.short[worker] = None;
        }
        draft.add(worker, id, sequence, tokens, needed, !decoding);
        true
    }

    /// Who gives its blocks to `first`: the last in standing; only those with no step under way can go.
    fn victim(&self, draft: &Draft<'_>, worker: usize, first: Standing) -> Option<SequenceId> {
        let sequences = draft.view.workers()[worker].sequences.iter();
        sequences
            .filter_map(|&id| {
                let sequence = draft.view.sequence(id)?;
                let idle = sequence.in_flight == 0
                    && !draft.plan.preempt.contains(&id)
                    && !draft.plan.work.iter().any(|work| work.sequence == id);
                idle.then(|| self.order.standing(id, sequence))
            })
            .filter(|&standing| standing > first)
            .max()
            .map(|standing| standing.sequence)
    }

    /// How much of a prompt a step takes.
    fn chunk(&self, draft: &Draft<'_>, worker: usize, sequence: &SequenceView) -> u32 {
        let room = draft.room(worker).min(draft.prefill[worker]);
        let tokens = sequence.pending().min(room);
        match &self.pace {
            Some(pace) => pace.chunk(draft.effort[worker], sequence.computed, tokens),
            None => tokens,
        }
    }

    /// Starts waiting sequences, in the policy's order, until one does not fit: nobody overtakes.
    fn admit(&mut self, draft: &mut Draft<'_>, shares: &[u32], here: &mut [u32], now: Now) {
        let workers = draft.view.workers();
        if draft.view.waiting().len() == 0 {
            return;
        }
        let mut line: Vec<SequenceId> = draft.view.waiting().collect();
        self.order.line_up(draft.view, &mut line, now);
        for id in line {
            let Some(sequence) = draft.view.sequence(id) else {
                continue;
            };
            // A worker that is short of blocks for its own sequences takes no new ones.
            let candidate = (0..workers.len())
                .filter(|&w| workers[w].capacity.alive && self.short[w].is_none())
                .filter(|&w| draft.room(w) > 0 && draft.prefill[w] > 0)
                .filter(|&w| here[w] < shares[w])
                .filter(|&w| match &self.pace {
                    Some(pace) => pace.takes(draft.view, w, sequence),
                    None => true,
                })
                .max_by_key(|&w| (draft.free_blocks[w], std::cmp::Reverse(w)));
            let Some(worker) = candidate else { return };
            let capacity = workers[worker].capacity;
            // Room for all that is known and one block to grow, unless the worker is empty: starting a sequence only to preempt it is waste.
            let whole = sequence.pending().div_ceil(capacity.block_tokens) + 1;
            let empty = draft.free_blocks[worker] == capacity.kv_blocks;
            if draft.plan.preempt.contains(&id) || (whole > draft.free_blocks[worker] && !empty) {
                return;
            }
            let tokens = self.chunk(draft, worker, sequence);
            let needed = View::blocks_needed(sequence, tokens, capacity.block_tokens);
            if tokens == 0 || needed > draft.free_blocks[worker] {
                return;
            }
            draft.add(worker, id, sequence, tokens, needed, true);
            here[worker] += self.weight(sequence);
        }
    }
}

fn micro_batches(view: &View) -> u32 {
    u32::from(view.micro_batches().max(1))
}

impl Draft<'_> {
    /// Rows that the step can still take on a worker.
    fn room(&self, worker: usize) -> u32 {
        self.view.workers()[worker].capacity.max_rows - self.rows[worker]
    }

    fn add(
        &mut self,
        worker: usize,
        id: SequenceId,
        sequence: &SequenceView,
        tokens: u32,
        blocks: u32,
        prefill: bool,
    ) {
        self.plan.work.push(Work {
            sequence: id,
            worker: worker as u16,
            tokens,
        });
        self.rows[worker] += tokens;
        self.effort[worker] += Pace::effort(sequence.computed, tokens);
        self.free_blocks[worker] -= blocks;
        if prefill {
            self.prefill[worker] -= tokens;
        }
    }
}
