//! First come, first served: continuous batching with chunked prefill.
//!
//! A step takes the decoding sequences of its micro-batch first, then fills up to the worker's row limit with chunks of prompts, in order of arrival. New
//! sequences go to the attention worker with the most free KV blocks.
//!
//! A worker opens a further micro-batch only when all of them can have [`FirstCome::fill`] rows: experts read their weights once for each micro-batch, so
//! one of few rows costs about as much as one of many. Rows are spread evenly over those that are open.
//!
//! When KV blocks run out, age decides. The oldest sequence that lacks a block makes its worker *short*: younger sequences there get no further work,
//! so that their steps run out, and are then preempted, youngest first, until the older one fits. The oldest sequence of a worker is thus never
//! stuck, and every sequence becomes the oldest in time.

use volley_transports::MicroBatch;

use super::{Policy, SequenceView, View};
use crate::protocol::{Now, SequenceId, StepPlan, Work};

/// See the module.
#[derive(Debug, Clone)]
pub struct FirstCome {
    /// Prompt tokens a step computes at most on one worker beside its decoding sequences. Long prompts in smaller chunks keep the time
    /// between other sequences' tokens short.
    pub prefill_tokens: u32,
    /// Rows (tokens of one step) that a micro-batch should have, if there is to be more than one.
    pub fill: u32,
    /// By worker: the oldest sequence that lacked a block when last planned.
    short: Vec<Option<SequenceId>>,
}

impl FirstCome {
    /// With at most `prefill_tokens` of prompts in one worker's step, and `fill` rows in a micro-batch before there is another.
    pub fn new(prefill_tokens: u32, fill: u32) -> Self {
        FirstCome {
            prefill_tokens: prefill_tokens.max(1),
            fill: fill.max(1),
            short: Vec::new(),
        }
    }
}

/// The plan being made, with what it has used up so far.
struct Draft<'a> {
    view: &'a View,
    plan: StepPlan,
    rows: Vec<u32>,
    prefill: Vec<u32>,
    free_blocks: Vec<u32>,
}

impl Policy for FirstCome {
    fn plan(&mut self, view: &View, micro_batch: MicroBatch, _now: Now) -> StepPlan {
        let workers = view.workers();
        self.short.resize(workers.len(), None);
        for (index, short) in self.short.iter_mut().enumerate() {
            // The mark of a sequence that has left the worker is stale.
            if short.is_some_and(|id| !workers[index].sequences.contains(&id)) {
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
        };
        let waiting = self.waiting(view);
        let shares: Vec<u32> = (0..workers.len())
            .map(|worker| self.share(view, worker, waiting, micro_batch))
            .collect();
        // Rows of each worker that this micro-batch has or may have.
        let mut here = vec![0; workers.len()];
        for (index, worker) in workers.iter().enumerate() {
            // Decoding sequences before prompts, by age within each.
            for decoding in [true, false] {
                for &id in &worker.sequences {
                    let Some(sequence) = view.sequence(id) else {
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
                    if self.extend(&mut draft, index, id, sequence) {
                        here[index] += self.weight(sequence);
                    }
                }
            }
        }
        self.admit(&mut draft, &shares, &mut here);
        draft.plan
    }
}

impl FirstCome {
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
        id: SequenceId,
        sequence: &SequenceView,
    ) -> bool {
        if draft.plan.preempt.contains(&id) || self.short[worker].is_some_and(|oldest| id > oldest)
        {
            return false;
        }
        let capacity = draft.view.workers()[worker].capacity;
        let room = capacity.max_rows - draft.rows[worker];
        let decoding = sequence.pending() == 1;
        let budget = if decoding {
            room
        } else {
            room.min(draft.prefill[worker])
        };
        let tokens = sequence.pending().min(budget);
        if tokens == 0 {
            return false;
        }
        let needed = View::blocks_needed(sequence, tokens, capacity.block_tokens);
        while needed > draft.free_blocks[worker] {
            // Youngest first; only those with no step under way can go.
            let victim = draft.view.workers()[worker]
                .sequences
                .iter()
                .rev()
                .copied()
                .find(|&other| {
                    other > id
                        && !draft.plan.preempt.contains(&other)
                        && !draft.plan.work.iter().any(|work| work.sequence == other)
                        && draft
                            .view
                            .sequence(other)
                            .is_some_and(|other| other.in_flight == 0)
                });
            let Some(victim) = victim else {
                self.short[worker] = Some(id);
                return false;
            };
            draft.plan.preempt.push(victim);
            draft.free_blocks[worker] += draft.view.sequence(victim).map_or(0, |v| v.blocks);
        }
        if self.short[worker] == Some(id) {
            self.short[worker] = None;
        }
        draft.add(worker, id, tokens, needed, !decoding);
        true
    }

    /// Starts waiting sequences, in order of arrival, until one does not fit: nobody overtakes.
    fn admit(&mut self, draft: &mut Draft<'_>, shares: &[u32], here: &mut [u32]) {
        let workers = draft.view.workers();
        for id in draft.view.waiting() {
            let Some(sequence) = draft.view.sequence(id) else {
                continue;
            };
            // A worker that is short of blocks for its own sequences takes no new ones.
            let candidate = (0..workers.len())
                .filter(|&w| workers[w].capacity.alive && self.short[w].is_none())
                .filter(|&w| draft.rows[w] < workers[w].capacity.max_rows && draft.prefill[w] > 0)
                .filter(|&w| here[w] < shares[w])
                .max_by_key(|&w| (draft.free_blocks[w], std::cmp::Reverse(w)));
            let Some(worker) = candidate else { return };
            let capacity = workers[worker].capacity;
            // Room for all that is known and one block to grow, unless the worker is empty: starting a sequence only to preempt it is waste.
            let whole = sequence.pending().div_ceil(capacity.block_tokens) + 1;
            let empty = draft.free_blocks[worker] == capacity.kv_blocks;
            if draft.plan.preempt.contains(&id) || (whole > draft.free_blocks[worker] && !empty) {
                return;
            }
            let room = (capacity.max_rows - draft.rows[worker]).min(draft.prefill[worker]);
            let tokens = sequence.pending().min(room);
            let needed = View::blocks_needed(sequence, tokens, capacity.block_tokens);
            if needed > draft.free_blocks[worker] {
                return;
            }
            draft.add(worker, id, tokens, needed, true);
            here[worker] += self.weight(sequence);
        }
    }
}

fn micro_batches(view: &View) -> u32 {
    u32::from(view.micro_batches().max(1))
}

impl Draft<'_> {
    fn add(
        &mut self,
        worker: usize,
        sequence: SequenceId,
        tokens: u32,
        blocks: u32,
        prefill: bool,
    ) {
        self.plan.work.push(Work {
            sequence,
            worker: worker as u16,
            tokens,
        });
        self.rows[worker] += tokens;
        self.free_blocks[worker] -= blocks;
        if prefill {
            self.prefill[worker] -= tokens;
        }
    }
}
