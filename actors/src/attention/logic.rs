//! What an attention worker does: what the [`Rally`] says, with the module, the lanes and the sequences.

use std::collections::VecDeque;
use std::time::Duration;

use volley_models::{AttentionModule, ComputeType, Member, ModuleError, SequenceSlice};
use volley_transports::{
    Endpoint, Event, ExchangeShape, Gather, Lane, Layer, MicroBatch, Progress, Role, Scatter,
    StepKey, Times, WorkerId,
};

use super::compute::{AttentionCompute, Outline};
use super::hops::{HopGauges, Hops, Window};
use super::rally::{Rally, Task};
use super::sampler::Sampler;
use super::sequences::Sequences;
use crate::clock::Clock;
use crate::data_loop::{Crewed, Fatal, Logic, Signal, Turn};
use crate::grouping::Grouping;
use crate::protocol::{
    AttentionCommand, AttentionStep, AttentionWord, SequenceResult, StepReport, StepTiming,
    StepWork,
};
use crate::request::FinishReason;
use crate::timeline::{Activity, Recorder, Span};
use crate::voice::{Voice, WorkerWord};
use crate::waits::WorkerWait;

/// Rows of logits computed at once: enough to read the head's weights once for a batch, little enough to stay small with large vocabularies.
const LOGIT_ROWS: usize = 32;
/// Longest sleep of an idle loop, so that deadlines are looked at.
const IDLE_WAIT: Duration = Duration::from_millis(100);
/// Waits that are shorter are not worth a word.
const FIRST_WARNING: Duration = Duration::from_secs(1);

/// What an attention worker's logic is made from.
pub(crate) struct AttentionParts<C: AttentionCompute> {
    pub(crate) worker: WorkerId,
    pub(crate) module: C,
    /// One for each micro-batch.
    pub(crate) activations: Vec<C::Batch>,
    pub(crate) outline: Outline,
    pub(crate) dtype: ComputeType,
    pub(crate) shape: ExchangeShape,
    pub(crate) kv_blocks: u32,
    pub(crate) block_tokens: u32,
    pub(crate) peer_deadline: Duration,
    /// Whether a slow hop gets a line in the log: between hosts that is news, between threads that share cores it is not.
    pub(crate) hops_are_named: bool,
    pub(crate) clock: Clock,
    pub(crate) recorder: Recorder,
    /// How it is heard.
    pub(crate) voice: Voice,
}

/// See the module.
pub(crate) struct AttentionLogic<C: AttentionCompute> {
    parts: AttentionParts<C>,
    grouping: Grouping,
    endpoint: Box<dyn Endpoint>,
    rally: Rally,
    hops: Hops,
    gauges: HopGauges,
    /// When the task began during which nobody looked at the lanes; none if the last turn found nothing to do.
    unseen_since: Option<Duration>,
    scatter: Scatter,
    batches: Vec<MicroBatchState<C::Batch>>,
    sequences: Sequences,
    sampler: Sampler,
    logits: Vec<f32>,
    /// A row of logits as it was before a choice changed it.
    unmodified: Vec<f32>,
    wanted: Vec<WantedRow>,
    unsent: VecDeque<AttentionWord>,
    /// A peer was accused: nothing is computed until the regrouping.
    halted: bool,
    next_warning: Duration,
}

/// One micro-batch's buffers.
struct MicroBatchState<B> {
    activations: B,
    gather: Gather,
    /// Outputs of a layer's experts, summed: `[max_rows, hidden]`.
    combined: Vec<f32>,
    rows: usize,
    /// The step's work that is really done: sequences that had ended are left out.
    live: Vec<StepWork>,
    results: Vec<SequenceResult>,
}

/// A row of the batch whose logits the step calls for.
struct WantedRow {
    row: u32,
    /// Index into the live work.
    work: usize,
    /// Position whose token's logits these are.
    position: usize,
}

impl<C: AttentionCompute> Logic for AttentionLogic<C> {
    type Command = AttentionCommand;
    type Task = Started;

    fn hear(&mut self, signal: Signal<AttentionCommand>) -> Result<(), Fatal> {
        match signal {
            Signal::Command(command) => self.command(command),
            Signal::Regroup(endpoint, grouping) => self.regroup(endpoint, grouping),
            Signal::Waits => self.say_waits(),
            Signal::Crash | Signal::Stop => {}
        }
        Ok(())
    }

    fn turn(&mut self) -> Turn<Started> {
        // What came while something was computed counts as having come at once: what is hidden is the module's time, not the network's.
        let unseen_since = self.unseen_since.take();
        while let Some(event) = self.endpoint.poll() {
            let seen = unseen_since.unwrap_or_else(|| self.parts.clock.now());
            self.event(event, seen);
        }
        self.send_words();
        let now = self.parts.clock.now();
        if let Some(window) = self.hops.window(now, self.batches.len()) {
            self.publish(&window);
        }
        if !self.halted
            && let Some(task) = self.rally.next(now)
        {
            self.unseen_since = Some(now);
            return Turn::Compute(Started { task, start: now });
        }
        self.check_deadlines();
        self.parts.recorder.flush();
        Turn::Rest(if self.unsent.is_empty() {
            IDLE_WAIT
        } else {
            Duration::from_millis(1)
        })
    }

    fn perform(&mut self, Started { task, start }: Started) -> Result<(), Fatal> {
        let index = task.micro_batch.0 as usize;
        let mut layer = task.layer.0 as usize;
        if task.begins {
            self.begin(task.micro_batch);
        } else {
            let batch = &mut self.batches[index];
            let out = &mut batch.combined[..batch.rows * self.parts.outline.hidden];
            batch
                .gather
                .combine(&*self.endpoint, out)
                .map_err(|error| error.to_string())?;
            self.parts.module.add_ffn(&mut batch.activations, out);
        }
        while layer < self.parts.outline.routed.len() {
            let batch = &mut self.batches[index];
            self.parts.module.attention(layer, &mut batch.activations);
            if self.parts.outline.routed[layer] {
                self.dispatch(task.micro_batch, Layer(layer as u16))?;
                self.record(Activity::Attention, task.micro_batch, layer, start);
                self.rally.dispatched(
                    task.micro_batch,
                    Layer(layer as u16),
                    self.parts.clock.now(),
                );
                return Ok(());
            }
            layer += 1;
        }
        self.sample(task.micro_batch)?;
        self.record(Activity::Sample, task.micro_batch, layer, start);
        let rows = self.batches[index].rows as u32;
        let now = self.parts.clock.now();
        if let Some((step, timing)) = self.rally.finished(task.micro_batch, rows, now) {
            self.finish(step, timing);
        }
        Ok(())
    }
}

impl Crewed for AttentionLogic<AttentionModule> {
    fn crew(&mut self) -> (&mut Member, &mut dyn Endpoint) {
        (self.parts.module.crew(), &mut *self.endpoint)
    }
}

/// A task of the rally that was begun.
pub(crate) struct Started {
    task: Task,
    start: Duration,
}

/// How much a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TaskSize {
    /// Tokens.
    pub(crate) rows: u32,
    /// Cached tokens that they attend to, summed over the sequences.
    pub(crate) cached: u64,
    /// It is the head, behind the last layer.
    pub(crate) head: bool,
}

impl<C: AttentionCompute> AttentionLogic<C> {
    pub(crate) fn new(
        mut parts: AttentionParts<C>,
        grouping: Grouping,
        endpoint: Box<dyn Endpoint>,
    ) -> Result<Self, Fatal> {
        let shape = parts.shape;
        let batches = std::mem::take(&mut parts.activations)
            .into_iter()
            .zip(0..)
            .map(|(activations, index)| {
                Ok(MicroBatchState {
                    activations,
                    gather: Gather::new(shape, MicroBatch(index)).map_err(|e| e.to_string())?,
                    combined: vec![0.0; shape.max_rows as usize * shape.hidden as usize],
                    rows: 0,
                    live: Vec::with_capacity(shape.max_rows as usize),
                    results: Vec::new(),
                })
            })
            .collect::<Result<Vec<_>, Fatal>>()?;
        Ok(AttentionLogic {
            rally: Rally::new(batches.len() as u8),
            hops: Hops::new(shape.expert_workers),
            gauges: HopGauges::new(parts.worker, shape.expert_workers),
            unseen_since: None,
            scatter: Scatter::new(shape).map_err(|e| e.to_string())?,
            sequences: Sequences::new(parts.kv_blocks, parts.block_tokens as usize),
            sampler: Sampler::new(parts.outline.vocab),
            logits: vec![0.0; LOGIT_ROWS * parts.outline.vocab],
            unmodified: vec![0.0; parts.outline.vocab],
            wanted: Vec::with_capacity(shape.max_rows as usize),
            unsent: VecDeque::new(),
            halted: false,
            next_warning: FIRST_WARNING,
            batches,
            grouping,
            endpoint,
            parts,
        })
    }

    /// How much a task is that was begun.
    pub(crate) fn size(&self, started: &Started) -> TaskSize {
        let task = started.task;
        let step = self.rally.step(task.micro_batch);
        let work = step.map_or(&[][..], |step| &step.work);
        TaskSize {
            rows: work.iter().map(|work| work.tokens).sum(),
            cached: work
                .iter()
                .map(|work| u64::from(work.start + work.tokens))
                .sum(),
            head: task.layer.0 as usize >= self.parts.outline.routed.len(),
        }
    }

    fn command(&mut self, command: AttentionCommand) {
        match command {
            AttentionCommand::Admit {
                sequence,
                request,
                generated,
                limit,
            } => {
                self.sequences.admit(sequence, request, &generated, limit);
            }
            AttentionCommand::Release(sequence) => self.sequences.release(sequence),
            AttentionCommand::Step(step) if step.epoch != self.grouping.epoch => {
                tracing::debug!(
                    "{}: {} is of {}, dropped",
                    self.parts.worker,
                    step.step,
                    step.epoch
                );
            }
            AttentionCommand::Step(step) => {
                let name = step.step;
                if !self.rally.open(step, self.parts.clock.now()) {
                    tracing::error!(
                        "{}: {name} names a micro-batch that is not",
                        self.parts.worker
                    );
                }
            }
        }
    }

    fn regroup(&mut self, endpoint: Box<dyn Endpoint>, grouping: Grouping) {
        self.endpoint = endpoint;
        self.grouping = grouping;
        let worker = self.parts.worker.index;
        if self.grouping.fresh.contains(worker) {
            self.sequences.clear();
        }
        self.rally.reset();
        self.batches
            .iter_mut()
            .for_each(|batch| batch.gather.abandon());
        self.halted = false;
        let epoch = self.grouping.epoch;
        // Behind the reports of what was ended before: whatever else was under way is void, and will be given out again.
        self.unsent
            .push_back(AttentionWord::Moved { worker, epoch });
        self.send_words();
        self.parts.voice.say(WorkerWord::Moved(epoch));
    }

    fn event(&mut self, event: Event, seen: Duration) {
        match event {
            Event::Arrived { lane, .. } => self.arrived(lane, seen),
            Event::Lost { peer, reason } if self.grouping.includes(peer) => {
                self.accuse(peer, reason.to_string());
            }
            Event::Lost { .. } => {}
        }
    }

    fn arrived(&mut self, lane: Lane, seen: Duration) {
        let expert = Role::Expert.worker(lane.peer);
        let gather = &mut self.batches[lane.micro_batch.0 as usize].gather;
        let progress = match self.endpoint.received(lane) {
            Ok(frame) => gather
                .add(lane.peer, frame)
                .map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        if let (Some(times), Some(away)) = (
            gather.times(lane.peer),
            self.rally.away(lane.micro_batch, seen),
        ) {
            self.hops.answered(lane.peer, away, times.total());
        }
        match progress {
            Ok(Progress::Complete) => {
                let times = |peer| gather.times(peer);
                let slowest = (0..self.parts.shape.expert_workers)
                    .filter_map(times)
                    .max_by_key(Times::total)
                    .unwrap_or(Times {
                        queued_ns: 0,
                        compute_ns: 0,
                    });
                self.rally.answered(lane.micro_batch, slowest, seen);
            }
            Ok(Progress::Broken { worker, cause }) => {
                self.accuse(worker, format!("it failed {}: {cause:?}", lane.micro_batch));
            }
            Ok(_) => {}
            Err(reason) => self.accuse(expert, reason),
        }
    }

    fn accuse(&mut self, peer: WorkerId, reason: String) {
        if !std::mem::replace(&mut self.halted, true) {
            let epoch = self.grouping.epoch;
            self.parts.voice.accuse(epoch, peer, reason);
        }
    }

    /// Gathers the step's rows and embeds them.
    fn begin(&mut self, micro_batch: MicroBatch) {
        let batch = &mut self.batches[micro_batch.0 as usize];
        batch.live.clear();
        batch.results.clear();
        let Some(step) = self.rally.step(micro_batch) else {
            return;
        };
        for work in &step.work {
            match self.sequences.prepare(work) {
                Ok(true) => batch.live.push(*work),
                Ok(false) => {}
                Err(error) => {
                    tracing::error!("{}: {}: {error}", self.parts.worker, step.step);
                    batch
                        .results
                        .push(SequenceResult::failed(work.sequence, error.to_string()));
                }
            }
        }
        // A module that refuses the batch names a sequence's fault that the checks above should have found; the step goes on without rows.
        if let Err(error) = Self::load(&mut self.parts.module, batch, &self.sequences) {
            tracing::error!("{}: {}: {error}", self.parts.worker, step.step);
            for work in std::mem::take(&mut batch.live) {
                batch
                    .results
                    .push(SequenceResult::failed(work.sequence, error.to_string()));
            }
            let empty = self
                .parts
                .module
                .begin(&mut batch.activations, std::iter::empty());
            debug_assert!(empty.is_ok(), "an empty batch is always taken");
        }
        batch.rows = batch.live.iter().map(|work| work.tokens as usize).sum();
        self.parts.module.embed(&mut batch.activations);
    }

    fn load(
        module: &mut C,
        batch: &mut MicroBatchState<C::Batch>,
        sequences: &Sequences,
    ) -> Result<(), ModuleError> {
        let slices = batch.live.iter().filter_map(|work| {
            let sequence = sequences.get(work.sequence)?;
            let start = work.start as usize;
            Some(SequenceSlice {
                tokens: &sequence.tokens()[start..start + work.tokens as usize],
                start: work.start,
                blocks: sequence.blocks(),
            })
        });
        module.begin(&mut batch.activations, slices)
    }

    fn dispatch(&mut self, micro_batch: MicroBatch, layer: Layer) -> Result<(), Fatal> {
        let Some(step) = self.rally.step(micro_batch) else {
            return Ok(());
        };
        let batch = &mut self.batches[micro_batch.0 as usize];
        let key = StepKey {
            epoch: self.grouping.epoch,
            step: step.step,
            layer,
            micro_batch,
        };
        let routed = self
            .parts
            .module
            .routed(&batch.activations, self.parts.dtype);
        let written = self.scatter.write(
            &mut *self.endpoint,
            &self.grouping.placement,
            key,
            &step.participants,
            routed.rows,
            routed.expert_ids,
            routed.expert_weights,
            &mut batch.gather,
        );
        written.map_err(|error| error.to_string())
    }

    /// Computes the logits that the step calls for, and from them tokens and log-probabilities.
    fn sample(&mut self, micro_batch: MicroBatch) -> Result<(), Fatal> {
        let batch = &mut self.batches[micro_batch.0 as usize];
        let vocab = self.parts.outline.vocab;
        let wanted = &mut self.wanted;
        wanted.clear();
        let mut first_row = 0;
        for (index, work) in batch.live.iter().enumerate() {
            let Some(sequence) = self.sequences.get(work.sequence) else {
                continue;
            };
            let last = work.start + work.tokens - 1;
            for position in work.start..=last {
                let target_is_prompt = (position as usize + 1) < sequence.prompt().len();
                let echo = sequence.request().prompt_logprobs.is_some() && target_is_prompt;
                if echo || (work.sample && position == last) {
                    wanted.push(WantedRow {
                        row: first_row + position - work.start,
                        work: index,
                        position: position as usize,
                    });
                }
            }
            first_row += work.tokens;
        }
        let first_result = batch.results.len();
        batch.results.extend(
            batch
                .live
                .iter()
                .map(|work| SequenceResult::empty(work.sequence, work.start)),
        );
        let results = &mut batch.results[first_result..];
        for wanted in wanted.chunks(LOGIT_ROWS) {
            let mut rows = [0u32; LOGIT_ROWS];
            for (slot, wanted) in rows.iter_mut().zip(wanted) {
                *slot = wanted.row;
            }
            let logits = &mut self.logits[..wanted.len() * vocab];
            let computed =
                self.parts
                    .module
                    .logits(&batch.activations, &rows[..wanted.len()], logits);
            computed.map_err(|error| error.to_string())?;
            for (logits, wanted) in logits.chunks_exact_mut(vocab).zip(wanted) {
                let (index, position) = (wanted.work, wanted.position);
                let work = &batch.live[index];
                let Some(sequence) = self.sequences.get_mut(work.sequence) else {
                    continue;
                };
                let result = &mut results[index];
                if position + 1 < sequence.prompt().len() {
                    let top = sequence.request().prompt_logprobs.unwrap_or(0);
                    let token = sequence.prompt()[position + 1];
                    result
                        .prompt_logprobs
                        .push(self.sampler.logprob(logits, token, top));
                    continue;
                }
                let request = sequence.request();
                if request.logprobs.is_some() {
                    // Log-probabilities are of the unmodified distribution, so it is kept before the choice changes it.
                    self.unmodified.copy_from_slice(logits);
                }
                let top = request.logprobs;
                let sampling = &request.sampling;
                let (prompt, generated) = (sequence.prompt(), sequence.generated());
                let Some(token) = self.sampler.sample(logits, sampling, prompt, generated) else {
                    result.finished = Some(sequence.fail(format!(
                        "the logits after token {position} are not finite numbers: the weights are damaged, or a value overflowed"
                    )));
                    continue;
                };
                result.logprob = top.map(|top| self.sampler.logprob(&self.unmodified, token, top));
                result.token = Some(token);
                result.finished = sequence.push(token);
            }
        }
        for (work, result) in batch.live.iter().zip(results) {
            if !work.sample
                && let Some(sequence) = self.sequences.get_mut(work.sequence)
            {
                result.finished = sequence.end_without_output((work.start + work.tokens) as usize);
            }
        }
        Ok(())
    }

    fn finish(&mut self, step: AttentionStep, timing: StepTiming) {
        let routed = self.parts.outline.routed.iter().filter(|&&routed| routed);
        self.hops.finished(&timing, routed.count() as u32);
        let batch = &mut self.batches[step.micro_batch.0 as usize];
        self.unsent.push_back(AttentionWord::Step(StepReport {
            worker: self.parts.worker.index,
            epoch: step.epoch,
            micro_batch: step.micro_batch,
            step: step.step,
            results: std::mem::take(&mut batch.results),
            timing,
        }));
        self.send_words();
    }

    fn send_words(&mut self) {
        while let Some(word) = self.unsent.pop_front() {
            if let Some(word) = self.parts.voice.report(word) {
                self.unsent.push_front(word);
                return;
            }
        }
    }

    /// Shows the hops of the last seconds, and names a peer whose frames take longer than what is to hide them.
    fn publish(&mut self, window: &Window) {
        for hop in &window.hops {
            self.gauges.set(hop);
            if hop.exposed && self.parts.hops_are_named {
                tracing::warn!(
                    "{}: one in a hundred frames to or from {} takes {:.0?} or more on its way (median {:.0?}), and the computing that is to hide it {:.0?}: steps wait for the network. \
                     Look at that link's drops, pauses and MTU (`volley doctor --cluster`); cluster.micro_batches = 1 hides nothing and needs nothing hidden",
                    self.parts.worker,
                    Role::Expert.worker(hop.peer),
                    hop.p99,
                    hop.median,
                    window.computing,
                );
            }
        }
    }

    /// Names whoever keeps a micro-batch waiting: in the log after a second and again at each doubling, to the supervisor at the deadline.
    fn check_deadlines(&mut self) {
        let now = self.parts.clock.now();
        let Some(wait) = self
            .rally
            .overdue(now, FIRST_WARNING)
            .max_by_key(|wait| wait.age)
        else {
            self.next_warning = FIRST_WARNING;
            return;
        };
        if self.halted || wait.age < self.next_warning {
            return;
        }
        let gather = &self.batches[wait.micro_batch.0 as usize].gather;
        let missing: Vec<WorkerId> = gather.missing().collect();
        let names: Vec<String> = missing.iter().map(WorkerId::to_string).collect();
        tracing::warn!(
            "{} has waited {:.1?} for {} ({}, {}, {})",
            self.parts.worker,
            wait.age,
            names.join(", "),
            wait.layer,
            wait.micro_batch,
            wait.step
        );
        let deadline = self.parts.peer_deadline;
        self.next_warning = (wait.age * 2).min(deadline.max(wait.age + FIRST_WARNING));
        if wait.age >= deadline
            && let Some(&peer) = missing.first()
        {
            self.accuse(
                peer,
                format!("it did not answer {} within {deadline:?}", wait.layer),
            );
        }
    }

    fn say_waits(&self) {
        let waits = self.rally.waits(self.parts.clock.now()).map(|wait| {
            let gather = &self.batches[wait.micro_batch.0 as usize].gather;
            WorkerWait {
                peers: gather.missing().collect(),
                micro_batch: wait.micro_batch,
                step: wait.step,
                layer: wait.layer,
                age: wait.age,
            }
        });
        self.parts.voice.say(WorkerWord::Waits(waits.collect()));
    }

    fn record(
        &mut self,
        activity: Activity,
        micro_batch: MicroBatch,
        layer: usize,
        start: Duration,
    ) {
        let Some(step) = self.rally.step(micro_batch) else {
            return;
        };
        self.parts.recorder.record(Span {
            activity,
            micro_batch,
            step: step.step,
            layer: Layer(layer as u16),
            rows: self.batches[micro_batch.0 as usize].rows as u32,
            start,
            end: self.parts.clock.now(),
        });
    }
}

impl SequenceResult {
    fn empty(sequence: crate::protocol::SequenceId, start: u32) -> Self {
        SequenceResult {
            sequence,
            token: None,
            logprob: None,
            prompt_logprobs: Vec::new(),
            prompt_start: start,
            finished: None,
        }
    }

    fn failed(sequence: crate::protocol::SequenceId, reason: String) -> Self {
        let finished = Some(FinishReason::Error(reason));
        SequenceResult {
            finished,
            ..SequenceResult::empty(sequence, 0)
        }
    }
}
