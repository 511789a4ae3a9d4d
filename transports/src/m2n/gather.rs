//! The attention side, inwards: outputs come back and are summed in top-k order.

use crate::element::widen;
use crate::wire::{CombineFrame, FrameError, HEADER_BYTES, Status, Times};
use crate::{
    Element, Endpoint, ExchangeShape, Lane, LaneError, MicroBatch, Role, ShapeError, StepKey,
    WorkerId,
};

/// The outputs that one attention worker awaits for one micro-batch.
///
/// [`Scatter::write`](crate::Scatter::write) opens an exchange, [`add`](Self::add) takes each answer,
/// [`combine`](Self::combine) sums when [`progress`](Self::progress) says that all are in. Outputs stay in their
/// slots until they are summed.
pub struct Gather {
    shape: ExchangeShape,
    micro_batch: MicroBatch,
    key: Option<StepKey>,
    rows: u32,
    /// Of each expert worker: `[workers]`.
    answers: Box<[Answer]>,
    missing: u16,
    broken: Option<(u16, Cause)>,
    /// Where the output of each (row, rank) stands: `[max_rows * top_k]`.
    places: Box<[Place]>,
    /// Weight of each (row, rank): `[max_rows * top_k]`.
    weights: Box<[f32]>,
}

/// Where an output stands: which worker's combine, and its position there.
#[derive(Clone, Copy, Default)]
pub(super) struct Place {
    pub(super) worker: u16,
    pub(super) index: u32,
}

#[derive(Clone, Copy, Default)]
struct Answer {
    state: State,
    rows: u32,
    assignments: u32,
    element: Option<Element>,
    times: Times,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum State {
    #[default]
    Idle,
    Awaited,
    In,
    Broken,
}

/// How far an exchange is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// No exchange is under way.
    Idle,
    /// Answers are missing.
    Waiting {
        /// Number of expert workers that have not answered.
        missing: u16,
    },
    /// All outputs are in: sum them.
    Complete,
    /// No answer is missing any more, but some are not outputs: dispatch again under a new placement.
    Broken {
        /// The first expert worker that failed the exchange.
        worker: WorkerId,
        /// How it failed.
        cause: Cause,
    },
}

/// Why an expert worker's outputs are not there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It is gone.
    Lost,
    /// It answered without outputs.
    Refused(Status),
    /// Its answer was not a combine for this exchange.
    Invalid,
}

impl Gather {
    /// Room for exchanges of this shape.
    ///
    /// # Errors
    /// The shape is empty or too large.
    pub fn new(shape: ExchangeShape, micro_batch: MicroBatch) -> Result<Self, ShapeError> {
        let assignments = shape.max_assignments()? as usize;
        Ok(Self {
            shape,
            micro_batch,
            key: None,
            rows: 0,
            answers: vec![Answer::default(); shape.expert_workers.into()].into(),
            missing: 0,
            broken: None,
            places: vec![Place::default(); assignments].into(),
            weights: vec![0.0; assignments].into(),
        })
    }

    /// The micro-batch whose outputs these are.
    pub const fn micro_batch(&self) -> MicroBatch {
        self.micro_batch
    }

    /// The exchange under way.
    pub const fn key(&self) -> Option<StepKey> {
        self.key
    }

    /// Takes the answer that arrived from expert worker `peer`. The bytes are checked, not copied; they must stay in
    /// the lane until [`combine`](Self::combine).
    ///
    /// # Errors
    /// The frame is malformed or belongs to another exchange, in which case the exchange is broken; or no answer of
    /// that worker is awaited, in which case nothing changes (a late answer to an exchange that was given up).
    pub fn add(&mut self, peer: u16, frame: &[u8]) -> Result<Progress, GatherError> {
        let worker = Role::Expert.worker(peer);
        let awaited = self
            .answers
            .get(usize::from(peer))
            .is_some_and(|answer| answer.state == State::Awaited);
        let Some(key) = self.key.filter(|_| awaited) else {
            return Err(GatherError::NotAwaited {
                worker,
                micro_batch: self.micro_batch,
            });
        };
        let checked = self.check(worker, key, frame);
        let cause = match checked {
            Ok(Status::Ok) => None,
            Ok(status) => Some(Cause::Refused(status)),
            Err(_) => Some(Cause::Invalid),
        };
        self.close(peer, cause);
        checked.map(|_| self.progress())
    }

    /// Notes that an expert worker is gone: its answer is awaited no more.
    pub fn lose(&mut self, peer: u16) -> Progress {
        if self
            .answers
            .get(usize::from(peer))
            .is_some_and(|answer| answer.state == State::Awaited)
        {
            self.close(peer, Some(Cause::Lost));
        }
        self.progress()
    }

    /// Gives the exchange up. Answers that still come are reported as not awaited.
    pub fn abandon(&mut self) {
        self.answers.fill(Answer::default());
        (self.key, self.missing, self.broken, self.rows) = (None, 0, None, 0);
    }

    /// How far the exchange is.
    pub fn progress(&self) -> Progress {
        match (self.key, self.missing, self.broken) {
            (None, ..) => Progress::Idle,
            (_, 0, None) => Progress::Complete,
            (_, 0, Some((peer, cause))) => Progress::Broken {
                worker: Role::Expert.worker(peer),
                cause,
            },
            (_, missing, _) => Progress::Waiting { missing },
        }
    }

    /// The expert workers whose answers are missing: what a log line on a missed deadline names.
    pub fn missing(&self) -> impl Iterator<Item = WorkerId> + '_ {
        let missing = self
            .answers
            .iter()
            .enumerate()
            .filter(|(_, answer)| answer.state == State::Awaited);
        missing.map(|(peer, _)| Role::Expert.worker(peer as u16))
    }

    /// Times that an expert worker reported with its outputs; none before they are in.
    pub fn times(&self, peer: u16) -> Option<Times> {
        self.answers
            .get(usize::from(peer))
            .filter(|answer| answer.state == State::In)
            .map(|answer| answer.times)
    }

    /// Writes `out[row] = sum over rank of weight * output` (`[n, hidden]`, f32) and closes the exchange. The sum
    /// starts from zero and runs in top-k order, so it is the same to the bit for every placement.
    ///
    /// # Errors
    /// Outputs are missing, `out` has another size, or a lane was posted before its outputs were summed. The exchange
    /// stays open.
    pub fn combine(&mut self, endpoint: &dyn Endpoint, out: &mut [f32]) -> Result<(), GatherError> {
        let key = match (self.progress(), self.key) {
            (Progress::Complete, Some(key)) => key,
            (progress, _) => {
                return Err(GatherError::Incomplete {
                    micro_batch: self.micro_batch,
                    progress,
                });
            }
        };
        let hidden = self.shape.hidden as usize;
        if out.len() != self.rows as usize * hidden {
            return Err(GatherError::OutSize {
                key,
                have: out.len(),
                need: self.rows as usize * hidden,
            });
        }
        let top_k = usize::from(self.shape.top_k);
        let ranks = self
            .places
            .chunks_exact(top_k)
            .zip(self.weights.chunks_exact(top_k));
        for (out, (places, weights)) in out.chunks_exact_mut(hidden).zip(ranks) {
            out.fill(0.0);
            for (place, &weight) in places.iter().zip(weights) {
                let frame = endpoint.received(Lane::new(place.worker, self.micro_batch))?;
                self.accumulate(key, *place, frame, weight, out)?;
            }
        }
        self.abandon();
        Ok(())
    }

    /// The exchange that still needs its lanes.
    pub(super) fn unfinished(&self) -> Option<StepKey> {
        self.key.filter(|_| self.missing > 0)
    }

    /// Opens an exchange of `rows` rows. Answers are awaited one by one as their dispatches are posted.
    pub(super) fn begin(&mut self, key: StepKey, rows: u32, weights: &[f32]) {
        self.abandon();
        (self.key, self.rows) = (Some(key), rows);
        self.weights[..weights.len()].copy_from_slice(weights);
    }

    pub(super) fn places_mut(&mut self) -> &mut [Place] {
        &mut self.places
    }

    pub(super) fn awaits(&mut self, peer: u16, rows: u32, assignments: u32) {
        let answer = Answer {
            state: State::Awaited,
            rows,
            assignments,
            ..Answer::default()
        };
        self.answers[usize::from(peer)] = answer;
        self.missing += 1;
    }

    pub(super) fn lost(&mut self, peer: u16) {
        self.awaits(peer, 0, 0);
        self.close(peer, Some(Cause::Lost));
    }

    fn close(&mut self, peer: u16, cause: Option<Cause>) {
        self.missing -= 1;
        self.answers[usize::from(peer)].state = if cause.is_some() {
            State::Broken
        } else {
            State::In
        };
        self.broken = self.broken.or(cause.map(|cause| (peer, cause)));
    }

    fn check(
        &mut self,
        worker: WorkerId,
        key: StepKey,
        frame: &[u8],
    ) -> Result<Status, GatherError> {
        let frame = CombineFrame::parse(frame, &self.shape.combine_limits()).map_err(|source| {
            GatherError::Frame {
                worker,
                key,
                source,
            }
        })?;
        let header = frame.header;
        if header.sender != worker.index {
            return Err(GatherError::Sender {
                worker,
                key,
                sender: header.sender,
            });
        }
        // A worker that could not read the dispatch cannot repeat its key.
        if header.status == Status::Rejected {
            return Ok(header.status);
        }
        if header.key != key {
            return Err(GatherError::OtherExchange {
                worker,
                key,
                found: header.key,
            });
        }
        let answer = &mut self.answers[usize::from(worker.index)];
        if header.status == Status::Ok {
            let (sent, back) = (
                (answer.rows, answer.assignments),
                (header.rows, header.assignments),
            );
            if sent != back {
                return Err(GatherError::Counts {
                    worker,
                    key,
                    sent,
                    back,
                });
            }
            (answer.element, answer.times) = (Some(header.element), header.times);
        }
        Ok(header.status)
    }

    /// `out += weight * output`, element by element: multiply, round, add, round.
    fn accumulate(
        &self,
        key: StepKey,
        place: Place,
        frame: &[u8],
        weight: f32,
        out: &mut [f32],
    ) -> Result<(), GatherError> {
        let worker = Role::Expert.worker(place.worker);
        let gone = GatherError::Overwritten { worker, key };
        let element = self.answers[usize::from(place.worker)]
            .element
            .ok_or(gone)?;
        let bytes = out.len() * element.bytes();
        let start = HEADER_BYTES + place.index as usize * bytes;
        let row = frame.get(start..start + bytes).ok_or(gone)?;
        match element {
            Element::F32 => {
                let row: &[f32] = zerocopy::FromBytes::ref_from_bytes(row).map_err(|_| gone)?;
                out.iter_mut()
                    .zip(row)
                    .for_each(|(out, y)| *out += weight * y);
            }
            Element::Bf16 => {
                let row: &[u16] = zerocopy::FromBytes::ref_from_bytes(row).map_err(|_| gone)?;
                out.iter_mut()
                    .zip(row)
                    .for_each(|(out, &y)| *out += weight * widen(y));
            }
        }
        Ok(())
    }
}

/// Why outputs could not be taken or summed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GatherError {
    /// Nothing is awaited from that worker.
    #[error(
        "{worker} answered for {micro_batch}, but no answer is awaited: a late answer to an exchange given up?"
    )]
    NotAwaited {
        /// The expert worker.
        worker: WorkerId,
        /// The micro-batch.
        micro_batch: MicroBatch,
    },
    /// The bytes are not a combine.
    #[error("{key}: the combine from {worker} is malformed: {source}")]
    Frame {
        /// The expert worker.
        worker: WorkerId,
        /// The exchange under way.
        key: StepKey,
        /// What is wrong.
        source: FrameError,
    },
    /// The combine names another sender than its lane's.
    #[error("{key}: the combine on the lane of {worker} says it comes from expert-{sender}")]
    Sender {
        /// The expert worker at the other end of the lane.
        worker: WorkerId,
        /// The exchange under way.
        key: StepKey,
        /// The sender in the header.
        sender: u16,
    },
    /// The combine belongs to another exchange.
    #[error("{key}: {worker} answered to {found}")]
    OtherExchange {
        /// The expert worker.
        worker: WorkerId,
        /// The exchange under way.
        key: StepKey,
        /// The exchange in the header.
        found: StepKey,
    },
    /// The combine has other counts than its dispatch.
    #[error("{key}: {worker} was sent (rows, assignments) {sent:?} and answered to {back:?}")]
    Counts {
        /// The expert worker.
        worker: WorkerId,
        /// The exchange under way.
        key: StepKey,
        /// Rows and assignments of the dispatch.
        sent: (u32, u32),
        /// Rows and assignments of the combine.
        back: (u32, u32),
    },
    /// Outputs are missing.
    #[error("{micro_batch} cannot be summed: {progress:?}")]
    Incomplete {
        /// The micro-batch.
        micro_batch: MicroBatch,
        /// How far the exchange is.
        progress: Progress,
    },
    /// The output buffer has another size.
    #[error("{key}: the sums take {need} elements, the buffer has {have}")]
    OutSize {
        /// The exchange.
        key: StepKey,
        /// Elements of the buffer.
        have: usize,
        /// Elements of the sums.
        need: usize,
    },
    /// The lane no longer has the outputs that were added.
    #[error(
        "{key}: the outputs of {worker} are no longer in their slot: sum before the lane is used again"
    )]
    Overwritten {
        /// The expert worker.
        worker: WorkerId,
        /// The exchange.
        key: StepKey,
    },
    /// A lane cannot be used.
    #[error(transparent)]
    Lane(#[from] LaneError),
}
