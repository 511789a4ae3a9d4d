//! The expert side: dispatches of all participants become one grouped batch, and its outputs go back.

use crate::participants::{bit, bits, set_bit};
use crate::wire::{
    CombineHead, CombineMut, DispatchFrame, FrameError, Header, Status, Times, write_status,
};
use crate::{
    Element, Endpoint, ExchangeShape, Lane, LaneError, Layer, MicroBatch, Participants, Placement,
    Role, Rows, RowsMut, ShapeError, Step, StepKey, WorkerId,
};

/// The dispatches that one expert worker collects for one micro-batch.
///
/// A round begins with the first dispatch of an exchange and is ready when every participant named in it has sent.
/// Then [`groups`](Self::groups) copies the rows out, grouped by expert, and [`respond`](Self::respond) sends the outputs
/// back. Dispatches stay in their slots until they are answered, and each is answered exactly once, so no lane is lost:
/// also a stale, a malformed or a contradicting one, with a status in place of outputs.
pub struct Merge {
    shape: ExchangeShape,
    me: u16,
    micro_batch: MicroBatch,
    round: Option<StepKey>,
    /// Bitmap of the participants of the round.
    participants: Box<[u64]>,
    /// Bitmap of those whose dispatch is in.
    arrived: Box<[u64]>,
    missing: u32,
    grouped: bool,
    /// Bitmap of the attention workers whose dispatch is kept for later.
    early: Box<[u64]>,
    /// Of each attention worker: `[attention_workers]`.
    senders: Box<[Sender]>,
    local_experts: usize,
    /// `[max_local_experts + 1]`: while collecting, counts by expert; when ready, where each expert's rows start.
    offsets: Box<[u32]>,
    /// Where each expert's next row goes while grouping: `[max_local_experts]`.
    next: Box<[u32]>,
    /// Position in the batch of every assignment, sender by sender: `[max_merged]`.
    places: Box<[u32]>,
}

#[derive(Clone, Copy)]
struct Sender {
    rows: u32,
    assignments: u32,
    element: Element,
}

/// What became of a dispatch that arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrival {
    /// It is in; others are missing.
    Waiting {
        /// Number of participants that have not sent.
        missing: u32,
    },
    /// It was the last: group the rows and compute.
    Ready(StepKey),
    /// It is of an old epoch and was answered so.
    Stale(StepKey),
    /// It is of an epoch or a step whose turn has not come. It is kept until [`Merge::revisit`] finds that it has.
    Early(StepKey),
}

/// A batch that was grouped by expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups<'a> {
    /// The exchange.
    pub key: StepKey,
    /// Rows of local expert `e` are `offsets[e]..offsets[e + 1]` of the batch: `[local_experts + 1]`.
    pub offsets: &'a [u32],
}

impl Groups<'_> {
    /// Number of rows of the batch.
    pub fn total(&self) -> u32 {
        self.offsets.last().copied().unwrap_or(0)
    }
}

/// How many answers went out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Responded {
    /// Answers posted.
    pub posted: u32,
    /// Participants that are gone.
    pub lost: u32,
}

impl Merge {
    /// Room for the rounds of one micro-batch at expert worker `me`, which holds at most `max_local_experts` experts
    /// at any layer and under any placement.
    ///
    /// # Errors
    /// The shape is empty or too large.
    pub fn new(
        shape: ExchangeShape,
        me: u16,
        micro_batch: MicroBatch,
        max_local_experts: u16,
    ) -> Result<Self, ShapeError> {
        let words = Participants::words_for(shape.attention_workers);
        let experts = usize::from(max_local_experts);
        let sender = Sender {
            rows: 0,
            assignments: 0,
            element: shape.element,
        };
        Ok(Self {
            shape,
            me,
            micro_batch,
            round: None,
            participants: vec![0; words].into(),
            arrived: vec![0; words].into(),
            missing: 0,
            grouped: false,
            early: vec![0; words].into(),
            senders: vec![sender; shape.attention_workers.into()].into(),
            local_experts: 0,
            offsets: vec![0; experts + 1].into(),
            next: vec![0; experts].into(),
            places: vec![0; shape.max_merged()? as usize].into(),
        })
    }

    /// Takes the dispatch that arrived on `lane`.
    ///
    /// A dispatch of an older epoch than the placement's is answered as stale; a round of an older epoch that is still
    /// open when a dispatch of the placement's epoch comes is given up the same way.
    ///
    /// # Errors
    /// Names the peer and what is wrong with its dispatch, which was then answered as rejected; the round goes on
    /// without it. [`MergeError::Duplicate`] and [`MergeError::OtherLane`] are the caller's mistakes and change nothing.
    pub fn arrived(
        &mut self,
        endpoint: &mut dyn Endpoint,
        placement: &Placement,
        lane: Lane,
    ) -> Result<Arrival, MergeError> {
        if lane.micro_batch != self.micro_batch || lane.peer >= self.shape.attention_workers {
            return Err(MergeError::OtherLane {
                lane,
                micro_batch: self.micro_batch,
            });
        }
        let worker = Role::Attention.worker(lane.peer);
        if bit(&self.arrived, lane.peer) {
            return Err(MergeError::Duplicate {
                worker,
                micro_batch: self.micro_batch,
            });
        }
        clear_bit(&mut self.early, lane.peer);
        let header = Header::parse(endpoint.received(lane)?);
        let epoch = header
            .map(|header| header.key.epoch)
            .unwrap_or(placement.epoch());
        match header {
            Ok(header) if epoch < placement.epoch() => {
                self.answer(endpoint, lane.peer, header.key, Status::Stale)?;
                return Ok(Arrival::Stale(header.key));
            }
            Ok(header) if epoch > placement.epoch() => {
                set_bit(&mut self.early, lane.peer);
                return Ok(Arrival::Early(header.key));
            }
            _ => {}
        }
        if self.round.is_some_and(|round| round.epoch < epoch) {
            let given_up = self.abandon(endpoint, Status::Stale);
            if let Err(error) = given_up {
                set_bit(&mut self.early, lane.peer);
                return Err(error);
            }
        }
        match self.join(endpoint.received(lane)?, placement, lane.peer) {
            Ok(arrival) => {
                if matches!(arrival, Arrival::Early(_)) {
                    set_bit(&mut self.early, lane.peer);
                }
                Ok(arrival)
            }
            Err(error) => {
                let key = header.map(|header| header.key).unwrap_or(StepKey {
                    epoch,
                    step: Step(0),
                    layer: Layer(0),
                    micro_batch: self.micro_batch,
                });
                self.answer(endpoint, lane.peer, key, Status::Rejected)?;
                Err(error)
            }
        }
    }

    /// The exchange that is being collected or computed.
    pub const fn key(&self) -> Option<StepKey> {
        self.round
    }

    /// Whether every participant of the round has sent.
    pub const fn is_ready(&self) -> bool {
        self.round.is_some() && self.missing == 0
    }

    /// Where each local expert's rows of a ready round start, and after the last, their number; empty while the round is collected.
    pub fn offsets(&self) -> &[u32] {
        if self.is_ready() {
            &self.offsets[..=self.local_experts]
        } else {
            &[]
        }
    }

    /// The participants of the round that have not sent: what a log line on a missed deadline names. If one of them is
    /// lost the round never gets ready: [`abandon`](Self::abandon) it.
    pub fn missing(&self) -> impl Iterator<Item = WorkerId> + '_ {
        let missing = bits(&self.participants).filter(|&worker| !bit(&self.arrived, worker));
        missing
            .filter(|_| self.round.is_some())
            .map(|worker| Role::Attention.worker(worker))
    }

    /// Offers the dispatches that were kept again, until a round is ready; returns its exchange. Call it after
    /// [`respond`](Self::respond), after [`abandon`](Self::abandon) and when the placement changed.
    ///
    /// # Errors
    /// As [`arrived`](Self::arrived), for the first dispatch that is refused; call again for the others.
    pub fn revisit(
        &mut self,
        endpoint: &mut dyn Endpoint,
        placement: &Placement,
    ) -> Result<Option<StepKey>, MergeError> {
        for peer in 0..self.shape.attention_workers {
            if !bit(&self.early, peer) {
                continue;
            }
            if let Arrival::Ready(key) =
                self.arrived(endpoint, placement, Lane::new(peer, self.micro_batch))?
            {
                return Ok(Some(key));
            }
        }
        Ok(None)
    }

    /// Forgets the kept dispatch of an attention worker that is gone. Its dispatch in the round, if any, stays until
    /// the round is answered.
    pub fn lose(&mut self, peer: u16) {
        if peer < self.shape.attention_workers {
            clear_bit(&mut self.early, peer);
        }
    }

    /// Copies the rows of a ready round to the start of `x` (`[total, hidden]`), expert by expert; within an expert by
    /// sender, then by row. Converts if the element types differ. May be called again until the round is answered.
    ///
    /// # Errors
    /// The round is not ready, `x` is too small, or a dispatch changed in its slot.
    pub fn groups(
        &mut self,
        endpoint: &dyn Endpoint,
        x: &mut RowsMut<'_>,
    ) -> Result<Groups<'_>, MergeError> {
        let key = self.ready()?;
        let hidden = self.shape.hidden as usize;
        self.fits("x", key, x.len())?;
        let limits = self.shape.dispatch_limits(self.local_experts as u16);
        self.next[..self.local_experts].copy_from_slice(&self.offsets[..self.local_experts]);
        let mut places = &mut self.places[..];
        for peer in bits(&self.arrived) {
            let changed = MergeError::Changed {
                worker: Role::Attention.worker(peer),
                key,
            };
            let frame = endpoint.received(Lane::new(peer, self.micro_batch))?;
            // Checked when it arrived, and again because a remote peer could have written since.
            let frame = DispatchFrame::parse(frame, &limits).map_err(|_| changed)?;
            if frame.header.assignments != self.senders[usize::from(peer)].assignments {
                return Err(changed);
            }
            let (these, rest) = places.split_at_mut(frame.row.len());
            places = rest;
            for ((&row, &expert), place) in frame.row.iter().zip(frame.expert).zip(these) {
                let expert = usize::from(expert);
                let at = self.next[expert];
                if at >= self.offsets[expert + 1] {
                    return Err(changed);
                }
                self.next[expert] = at + 1;
                *place = at;
                x.set_row(at as usize, frame.rows.row(row as usize, hidden));
            }
        }
        self.grouped = true;
        Ok(Groups {
            key,
            offsets: &self.offsets[..=self.local_experts],
        })
    }

    /// Sends the outputs (`y`: `[total, hidden]`, in the order of the groups) back to every participant, in the order
    /// of its assignments and in the element type of its dispatch, and closes the round.
    ///
    /// # Errors
    /// The rows were not grouped or `y` is too small: nothing was sent. A lane could not be used: the others were
    /// answered, and the round is closed. A participant that is gone is not an error.
    pub fn respond(
        &mut self,
        endpoint: &mut dyn Endpoint,
        y: Rows<'_>,
        times: Times,
    ) -> Result<Responded, MergeError> {
        let key = self.ready()?;
        if !self.grouped {
            return Err(MergeError::NotReady {
                micro_batch: self.micro_batch,
            });
        }
        self.fits("y", key, y.len())?;
        let (mut responded, mut failure, mut start) = (Responded::default(), None, 0);
        for peer in bits(&self.arrived) {
            let places =
                &self.places[start..][..self.senders[usize::from(peer)].assignments as usize];
            start += places.len();
            match self.send(endpoint, peer, key, y, places, times) {
                Ok(()) => responded.posted += 1,
                Err(MergeError::Lane(LaneError::PeerLost { .. })) => responded.lost += 1,
                Err(error) => failure = failure.or(Some(error)),
            }
        }
        self.close();
        failure.map_or(Ok(responded), Err)
    }

    /// Gives the round up: everyone who has sent is answered with `status` and no outputs. For a new epoch
    /// ([`Status::Stale`]), a missed deadline or a failed computation ([`Status::Failed`]).
    ///
    /// # Errors
    /// A lane could not be used: the others were answered.
    pub fn abandon(
        &mut self,
        endpoint: &mut dyn Endpoint,
        status: Status,
    ) -> Result<Responded, MergeError> {
        let (mut responded, mut failure) = (Responded::default(), None);
        if let Some(key) = self.round {
            for peer in bits(&self.arrived) {
                match self.answer(endpoint, peer, key, status) {
                    Ok(true) => responded.posted += 1,
                    Ok(false) => responded.lost += 1,
                    Err(error) => failure = failure.or(Some(error)),
                }
            }
        }
        self.close();
        failure.map_or(Ok(responded), Err)
    }

    fn join(
        &mut self,
        frame: &[u8],
        placement: &Placement,
        peer: u16,
    ) -> Result<Arrival, MergeError> {
        let worker = Role::Attention.worker(peer);
        let micro_batch = self.micro_batch;
        let malformed = |source| MergeError::Frame {
            worker,
            micro_batch,
            source,
        };
        let key = Header::parse(frame).map_err(malformed)?.key;
        let local_experts = placement.local_experts(key.layer, self.me).len();
        if local_experts == 0 || local_experts > self.next.len() {
            return Err(MergeError::Placement {
                worker,
                key,
                local_experts,
                limit: self.next.len(),
            });
        }
        // At most as many as fit `next`, whose length came as a u16.
        let limits = self.shape.dispatch_limits(local_experts as u16);
        let frame = DispatchFrame::parse(frame, &limits).map_err(malformed)?;
        if frame.header.sender != peer {
            return Err(MergeError::Sender {
                worker,
                key,
                sender: frame.header.sender,
            });
        }
        if key.micro_batch != micro_batch {
            return Err(MergeError::OtherMicroBatch {
                worker,
                key,
                micro_batch,
            });
        }
        if let Some(round) = self.round.filter(|&round| round != key) {
            // Both are of the placement's epoch, so they differ in step, or in layer alone.
            if round.step == key.step {
                return Err(MergeError::OtherExchange { worker, key, round });
            }
            if self.missing == 0 || key.step > round.step {
                return Ok(Arrival::Early(key));
            }
            self.postpone();
        }
        if self.round.is_none() {
            self.open(key, frame.participants, local_experts);
        } else if *self.participants != *frame.participants {
            return Err(MergeError::OtherParticipants { worker, key });
        }
        let Header {
            rows,
            assignments,
            element,
            ..
        } = frame.header;
        self.senders[usize::from(peer)] = Sender {
            rows,
            assignments,
            element,
        };
        for &expert in frame.expert {
            self.offsets[usize::from(expert) + 1] += 1;
        }
        set_bit(&mut self.arrived, peer);
        self.missing -= 1;
        if self.missing > 0 {
            return Ok(Arrival::Waiting {
                missing: self.missing,
            });
        }
        for expert in 0..self.local_experts {
            self.offsets[expert + 1] += self.offsets[expert];
        }
        Ok(Arrival::Ready(key))
    }

    fn open(&mut self, key: StepKey, participants: &[u64], local_experts: usize) {
        self.round = Some(key);
        self.participants.copy_from_slice(participants);
        self.missing = participants.iter().map(|word| word.count_ones()).sum();
        self.local_experts = local_experts;
        self.offsets.fill(0);
    }

    /// Keeps the dispatches of an incomplete round for later, because an earlier step has come.
    fn postpone(&mut self) {
        for (early, arrived) in self.early.iter_mut().zip(&self.arrived) {
            *early |= arrived;
        }
        self.close();
    }

    fn close(&mut self) {
        self.round = None;
        self.missing = 0;
        self.grouped = false;
        self.arrived.fill(0);
    }

    fn ready(&self) -> Result<StepKey, MergeError> {
        self.round
            .filter(|_| self.missing == 0)
            .ok_or(MergeError::NotReady {
                micro_batch: self.micro_batch,
            })
    }

    fn fits(&self, what: &'static str, key: StepKey, have: usize) -> Result<(), MergeError> {
        let need = self.offsets[self.local_experts] as usize * self.shape.hidden as usize;
        if have >= need {
            Ok(())
        } else {
            Err(MergeError::Size {
                what,
                key,
                have,
                need,
            })
        }
    }

    fn send(
        &self,
        endpoint: &mut dyn Endpoint,
        peer: u16,
        key: StepKey,
        y: Rows<'_>,
        places: &[u32],
        times: Times,
    ) -> Result<(), MergeError> {
        let Sender {
            rows,
            assignments,
            element,
        } = self.senders[usize::from(peer)];
        let hidden = self.shape.hidden;
        let head = CombineHead {
            key,
            sender: self.me,
            element,
            hidden,
            rows,
            assignments,
            times,
        };
        let lane = Lane::new(peer, self.micro_batch);
        let worker = Role::Attention.worker(peer);
        let mut frame = CombineMut::lay_out(endpoint.slot(lane)?, head).map_err(|source| {
            MergeError::Answer {
                worker,
                key,
                source,
            }
        })?;
        for (at, &place) in places.iter().enumerate() {
            frame
                .rows
                .set_row(at, y.row(place as usize, hidden as usize));
        }
        let len = frame.len;
        Ok(endpoint.post(lane, len)?)
    }

    /// Answers a dispatch without outputs. False if the peer is gone.
    fn answer(
        &self,
        endpoint: &mut dyn Endpoint,
        peer: u16,
        key: StepKey,
        status: Status,
    ) -> Result<bool, MergeError> {
        let (hidden, element) = (self.shape.hidden, self.shape.element);
        let times = Times::default();
        let head = CombineHead {
            key,
            sender: self.me,
            element,
            hidden,
            rows: 0,
            assignments: 0,
            times,
        };
        let lane = Lane::new(peer, self.micro_batch);
        let worker = Role::Attention.worker(peer);
        let len = write_status(endpoint.slot(lane)?, head, status).map_err(|source| {
            MergeError::Answer {
                worker,
                key,
                source,
            }
        })?;
        match endpoint.post(lane, len) {
            Ok(()) => Ok(true),
            Err(LaneError::PeerLost { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

fn clear_bit(words: &mut [u64], index: u16) {
    words[usize::from(index) / 64] &= !(1 << (index % 64));
}

/// Why a dispatch was refused, or a batch could not be made or answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    /// The lane is not one of this merge.
    #[error("the {lane} was offered to the merge of {micro_batch}")]
    OtherLane {
        /// The lane offered.
        lane: Lane,
        /// The micro-batch of the merge.
        micro_batch: MicroBatch,
    },
    /// The dispatch of that worker is already in the round.
    #[error("the dispatch of {worker} for {micro_batch} was offered twice")]
    Duplicate {
        /// The attention worker.
        worker: WorkerId,
        /// The micro-batch.
        micro_batch: MicroBatch,
    },
    /// The bytes are not a dispatch.
    #[error("the dispatch of {worker} for {micro_batch} is malformed: {source}")]
    Frame {
        /// The attention worker.
        worker: WorkerId,
        /// The micro-batch.
        micro_batch: MicroBatch,
        /// What is wrong.
        source: FrameError,
    },
    /// The dispatch names another sender than its lane's.
    #[error("{key}: the dispatch on the lane of {worker} says it comes from attention-{sender}")]
    Sender {
        /// The attention worker at the other end of the lane.
        worker: WorkerId,
        /// The exchange in the header.
        key: StepKey,
        /// The sender in the header.
        sender: u16,
    },
    /// The dispatch names another micro-batch than its lane's.
    #[error("{key}: {worker} sent it on the lane for {micro_batch}")]
    OtherMicroBatch {
        /// The attention worker.
        worker: WorkerId,
        /// The exchange in the header.
        key: StepKey,
        /// The micro-batch of the lane.
        micro_batch: MicroBatch,
    },
    /// The dispatch is of another exchange than the round that is open.
    #[error(
        "{worker} sent {key} while {round} is open: participants of a micro-batch move in step"
    )]
    OtherExchange {
        /// The attention worker.
        worker: WorkerId,
        /// The exchange in the header.
        key: StepKey,
        /// The round that is open.
        round: StepKey,
    },
    /// The dispatch names other participants than the first of its round.
    #[error("{key}: {worker} names other participants than those that sent before it")]
    OtherParticipants {
        /// The attention worker.
        worker: WorkerId,
        /// The exchange.
        key: StepKey,
    },
    /// This worker holds no experts at that layer, or more than it has room for.
    #[error(
        "{key}: {worker} sent to a worker that holds {local_experts} experts there, with room for {limit}"
    )]
    Placement {
        /// The attention worker.
        worker: WorkerId,
        /// The exchange.
        key: StepKey,
        /// Experts held at the layer.
        local_experts: usize,
        /// Experts there is room for.
        limit: usize,
    },
    /// There is no batch to group or to answer.
    #[error("{micro_batch} has no batch: wait until it is ready, group it, then answer it once")]
    NotReady {
        /// The micro-batch.
        micro_batch: MicroBatch,
    },
    /// A buffer is too small for the batch.
    #[error("{key}: {what} takes {need} elements, the buffer has {have}")]
    Size {
        /// The buffer.
        what: &'static str,
        /// The exchange.
        key: StepKey,
        /// Elements of the buffer.
        have: usize,
        /// Elements of the batch.
        need: usize,
    },
    /// A dispatch is no longer what it was when it arrived.
    #[error("{key}: the dispatch of {worker} changed in its slot after it arrived")]
    Changed {
        /// The attention worker.
        worker: WorkerId,
        /// The exchange.
        key: StepKey,
    },
    /// An answer did not fit its slot.
    #[error("{key}: the combine to {worker} does not fit its slot: {source}")]
    Answer {
        /// The attention worker.
        worker: WorkerId,
        /// The exchange.
        key: StepKey,
        /// What does not fit.
        source: FrameError,
    },
    /// A lane cannot be used.
    #[error(transparent)]
    Lane(#[from] LaneError),
}
