//! What an expert worker does: collects dispatches, computes experts, sends the outputs back.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use volley_models::{ComputeType, Member, kernels};
use volley_transports::{
    Arrival, Endpoint, Event, ExchangeShape, Lane, Merge, MicroBatch, Role, Rows, RowsMut, Status,
    StepKey, Times, WorkerId,
};

use super::compute::{ExpertCompute, Loaded};
use super::load::ExpertLoad;
use crate::clock::Clock;
use crate::data_loop::{Crewed, Fatal, Logic, Signal, Turn};
use crate::grouping::Grouping;
use crate::timeline::{Activity, Recorder, Span};
use crate::voice::{Voice, WorkerWord};
use crate::waits::WorkerWait;

/// Longest sleep of an idle loop, so that deadlines are looked at.
const IDLE_WAIT: Duration = Duration::from_millis(100);
/// Waits that are shorter are not worth a word.
const FIRST_WARNING: Duration = Duration::from_secs(1);

/// What an expert worker's logic is made from.
pub(crate) struct ExpertParts<C> {
    pub(crate) worker: WorkerId,
    pub(crate) module: C,
    pub(crate) hidden: usize,
    pub(crate) dtype: ComputeType,
    pub(crate) shape: ExchangeShape,
    pub(crate) micro_batches: u8,
    pub(crate) peer_deadline: Duration,
    pub(crate) clock: Clock,
    pub(crate) recorder: Recorder,
    pub(crate) load: Arc<ExpertLoad>,
    /// How it is heard.
    pub(crate) voice: Voice,
}

/// What an expert worker is told.
pub(crate) enum ExpertCommand {
    /// Hold these experts beside its own, and no others.
    Adopt(Vec<u16>),
}

/// See the module.
pub(crate) struct ExpertLogic<C> {
    parts: ExpertParts<C>,
    grouping: Grouping,
    endpoint: Box<dyn Endpoint>,
    rounds: Vec<Round>,
    /// Micro-batches whose dispatches are all in, in order of their completion.
    ready: VecDeque<MicroBatch>,
    x: Batch,
    y: Vec<f32>,
    next_warning: Duration,
    /// When the task began during which nobody looked at the lanes; none if the last turn found nothing to do.
    unseen_since: Option<Duration>,
}

struct Round {
    merge: Merge,
    /// When its first dispatch came.
    began: Option<Duration>,
}

/// The grouped rows, in the type that the module computes with.
enum Batch {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
}

/// A round whose computing was begun.
pub(crate) struct Begun {
    micro_batch: MicroBatch,
    start: Duration,
}

impl<C: ExpertCompute> Logic for ExpertLogic<C> {
    type Command = ExpertCommand;
    type Task = Begun;

    fn hear(&mut self, signal: Signal<ExpertCommand>) -> Result<(), Fatal> {
        match signal {
            Signal::Command(ExpertCommand::Adopt(experts)) => self.adopt(&experts),
            Signal::Regroup(endpoint, grouping) => {
                self.endpoint = endpoint;
                self.grouping = grouping;
                self.ready.clear();
                self.rounds = self.fresh_rounds()?;
            }
            Signal::Waits => self.say_waits(),
            Signal::Crash | Signal::Stop => {}
        }
        Ok(())
    }

    fn turn(&mut self) -> Turn<Begun> {
        // What came while something was computed counts as having come at once: it waits for this worker, not for the network.
        let unseen_since = self.unseen_since.take();
        while let Some(event) = self.endpoint.poll() {
            match event {
                Event::Arrived { lane, .. } => {
                    let seen = unseen_since.unwrap_or_else(|| self.parts.clock.now());
                    self.arrived(lane, seen);
                }
                Event::Lost { peer, reason } => {
                    self.rounds
                        .iter_mut()
                        .for_each(|round| round.merge.lose(peer.index));
                    if self.grouping.includes(peer) {
                        self.accuse(peer, reason.to_string());
                    }
                }
            }
        }
        if let Some(micro_batch) = self.ready.pop_front() {
            let start = self.parts.clock.now();
            self.unseen_since = Some(start);
            return Turn::Compute(Begun { micro_batch, start });
        }
        self.check_deadlines();
        self.parts.recorder.flush();
        Turn::Rest(IDLE_WAIT)
    }

    fn perform(&mut self, begun: Begun) -> Result<(), Fatal> {
        self.compute(begun)
    }
}

impl Crewed for ExpertLogic<Loaded> {
    fn crew(&mut self) -> (&mut Member, &mut dyn Endpoint) {
        (self.parts.module.module.crew(), &mut *self.endpoint)
    }
}

impl<C: ExpertCompute> ExpertLogic<C> {
    pub(crate) fn new(
        parts: ExpertParts<C>,
        grouping: Grouping,
        endpoint: Box<dyn Endpoint>,
    ) -> Result<Self, Fatal> {
        let shape = parts.shape;
        let size =
            shape.max_merged().map_err(|error| error.to_string())? as usize * shape.hidden as usize;
        let mut this = ExpertLogic {
            rounds: Vec::new(),
            ready: VecDeque::with_capacity(parts.micro_batches as usize),
            x: match parts.dtype {
                ComputeType::F32 => Batch::F32(vec![0.0; size]),
                ComputeType::Bf16 => Batch::Bf16(vec![0; size]),
            },
            y: vec![0.0; size],
            next_warning: FIRST_WARNING,
            unseen_since: None,
            grouping,
            endpoint,
            parts,
        };
        this.rounds = this.fresh_rounds()?;
        Ok(this)
    }

    /// Where each local expert's rows of a round start, and after the last, their number.
    pub(crate) fn offsets(&self, begun: &Begun) -> &[u32] {
        self.rounds[begun.micro_batch.0 as usize].merge.offsets()
    }

    /// Loads experts whose workers are gone. The cluster cannot go on without them, so nothing waits that could be done meanwhile.
    fn adopt(&mut self, experts: &[u16]) {
        let parts = &mut self.parts;
        match parts.module.adopt(experts) {
            Ok(()) => tracing::info!("{} has adopted experts {experts:?}", parts.worker),
            Err(error) => tracing::error!(
                "{} cannot adopt experts {experts:?}: {error}; their own worker has to come back",
                parts.worker
            ),
        }
        parts.voice.say(WorkerWord::Loaded(parts.module.holds()));
    }

    fn say_waits(&self) {
        let now = self.parts.clock.now();
        let waits = self.rounds.iter().filter_map(|round| {
            let (key, began) = (round.merge.key()?, round.began?);
            Some(WorkerWait {
                peers: round.merge.missing().collect(),
                micro_batch: key.micro_batch,
                step: key.step,
                layer: key.layer,
                age: now.saturating_sub(began),
            })
        });
        self.parts.voice.say(WorkerWord::Waits(waits.collect()));
    }

    fn accuse(&self, peer: WorkerId, reason: String) {
        self.parts.voice.accuse(self.grouping.epoch, peer, reason);
    }

    fn fresh_rounds(&self) -> Result<Vec<Round>, Fatal> {
        let parts = &self.parts;
        let locals = self
            .grouping
            .placement
            .max_local_experts(parts.worker.index);
        (0..parts.micro_batches)
            .map(|index| {
                let merge = Merge::new(parts.shape, parts.worker.index, MicroBatch(index), locals);
                Ok(Round {
                    merge: merge.map_err(|error| error.to_string())?,
                    began: None,
                })
            })
            .collect()
    }

    fn arrived(&mut self, lane: Lane, seen: Duration) {
        let round = &mut self.rounds[lane.micro_batch.0 as usize];
        round.began.get_or_insert(seen);
        match round
            .merge
            .arrived(&mut *self.endpoint, &self.grouping.placement, lane)
        {
            Ok(Arrival::Ready(_)) => self.ready.push_back(lane.micro_batch),
            Ok(_) => {}
            Err(error) => {
                self.accuse(Role::Attention.worker(lane.peer), error.to_string());
            }
        }
    }

    /// Looks again at dispatches that came before their turn: those of an attention worker that sat out the step which was just computed.
    fn revisit(&mut self, micro_batch: MicroBatch) -> Result<(), Fatal> {
        let round = &mut self.rounds[micro_batch.0 as usize];
        let ready = round
            .merge
            .revisit(&mut *self.endpoint, &self.grouping.placement);
        if ready.map_err(|error| error.to_string())?.is_some() {
            self.ready.push_back(micro_batch);
        }
        let round = &mut self.rounds[micro_batch.0 as usize];
        round.began = round.merge.key().map(|_| self.parts.clock.now());
        Ok(())
    }

    fn compute(&mut self, Begun { micro_batch, start }: Begun) -> Result<(), Fatal> {
        let round = &mut self.rounds[micro_batch.0 as usize];
        let queued = start.saturating_sub(round.began.take().unwrap_or(start));
        let mut x = match &mut self.x {
            Batch::F32(x) => RowsMut::F32(x),
            Batch::Bf16(x) => RowsMut::Bf16(x),
        };
        let groups = round
            .merge
            .groups(&*self.endpoint, &mut x)
            .map_err(|error| error.to_string())?;
        let (key, total) = (groups.key, groups.total() as usize);
        let layer = key.layer.0 as usize;
        let size = total * self.parts.hidden;
        let x = match &self.x {
            Batch::F32(x) => kernels::Rows::F32(&x[..size]),
            Batch::Bf16(x) => kernels::Rows::Bf16(&x[..size]),
        };
        let y = &mut self.y[..size];
        let placement = &self.grouping.placement;
        let experts = placement.local_experts(key.layer, self.parts.worker.index);
        let computed = self
            .parts
            .module
            .forward(layer, experts, groups.offsets, x, y);
        if let Err(error) = computed {
            tracing::error!("{}: {key}: {error}", self.parts.worker);
            let answered = round.merge.abandon(&mut *self.endpoint, Status::Failed);
            answered.map_err(|error| error.to_string())?;
            return self.revisit(micro_batch);
        }
        for (&expert, range) in experts.iter().zip(groups.offsets.windows(2)) {
            self.parts.load.count(layer, expert, range[1] - range[0]);
        }
        let computed = self.parts.clock.now().saturating_sub(start);
        let times = Times {
            queued_ns: queued.as_nanos() as u64,
            compute_ns: computed.as_nanos() as u64,
        };
        let responded = round
            .merge
            .respond(&mut *self.endpoint, Rows::F32(y), times);
        responded.map_err(|error| error.to_string())?;
        self.record(key, total as u32, start);
        self.revisit(micro_batch)
    }

    /// Names the participants that keep a round open: in the log after a second and again at each doubling, to the supervisor before the attention workers
    /// that wait for this one lose patience with it.
    fn check_deadlines(&mut self) {
        let now = self.parts.clock.now();
        let ages = self.rounds.iter().filter_map(|round| {
            let age = now.saturating_sub(round.began?);
            round.merge.key().map(|key| (age, key, &round.merge))
        });
        let Some((age, key, merge)) = ages.max_by_key(|(age, ..)| *age) else {
            self.next_warning = FIRST_WARNING;
            return;
        };
        if age < FIRST_WARNING {
            self.next_warning = FIRST_WARNING;
        }
        if age < self.next_warning {
            return;
        }
        let missing: Vec<WorkerId> = merge.missing().collect();
        let names: Vec<String> = missing.iter().map(WorkerId::to_string).collect();
        tracing::warn!(
            "{} has waited {age:.1?} for {} ({key})",
            self.parts.worker,
            names.join(", ")
        );
        let deadline = self.parts.peer_deadline * 3 / 4;
        self.next_warning = (age * 2).min(deadline.max(age + FIRST_WARNING));
        if age >= deadline
            && let Some(&peer) = missing.first()
        {
            let reason = format!("it did not send for {key} within {deadline:?}");
            self.accuse(peer, reason);
        }
    }

    fn record(&mut self, key: StepKey, rows: u32, start: Duration) {
        self.parts.recorder.record(Span {
            activity: Activity::Experts,
            micro_batch: key.micro_batch,
            step: key.step,
            layer: key.layer,
            rows,
            start,
            end: self.parts.clock.now(),
        });
    }
}
