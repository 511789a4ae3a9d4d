//! The attention side, outwards: rows to the workers of their experts.

use super::gather::{Gather, Place};
use crate::wire::{DispatchHead, DispatchMut, FrameError};
use crate::{
    Endpoint, ExchangeShape, Lane, LaneError, Layer, MicroBatch, Participants, Placement, Role,
    Rows, ShapeError, StepKey, WorkerId,
};

/// Builds the dispatches of one attention worker, in place in their slots.
///
/// One serves all micro-batches, since it keeps nothing between calls; what has to be remembered is in the
/// micro-batch's [`Gather`]. Cost: the copies of the rows, plus a few passes over the assignments.
pub struct Scatter {
    shape: ExchangeShape,
    /// Assignments sorted by worker, within a worker by (row, rank): `[max_rows * top_k]`.
    order: Box<[u32]>,
    /// Where each worker's assignments start in `order`: `[workers + 1]`.
    start: Box<[u32]>,
    /// Where each worker's next assignment goes while sorting: `[workers]`.
    next: Box<[u32]>,
    /// Number of distinct rows of each worker: `[workers]`.
    rows: Box<[u32]>,
    /// The row that a worker was given last while counting: `[workers]`.
    last: Box<[u32]>,
}

impl Scatter {
    /// Scratch for exchanges of this shape.
    ///
    /// # Errors
    /// The shape is empty or too large.
    pub fn new(shape: ExchangeShape) -> Result<Self, ShapeError> {
        let workers = usize::from(shape.expert_workers);
        Ok(Self {
            shape,
            order: vec![0; shape.max_assignments()? as usize].into(),
            start: vec![0; workers + 1].into(),
            next: vec![0; workers].into(),
            rows: vec![0; workers].into(),
            last: vec![0; workers].into(),
        })
    }

    /// Sends `rows` (`[n, hidden]`, f32 or bf16) to the workers of their experts and makes `gather` await the
    /// outputs. `expert_ids` and `weights` are `[n, top_k]`, best first. `n` may be zero.
    ///
    /// Each row travels once to each worker that holds one of its experts. Every recipient of the placement is sent
    /// a frame, be it empty, so that it knows when all participants have sent. A recipient that is lost does not fail the
    /// call: the others are sent to, and `gather` shows the loss.
    ///
    /// # Errors
    /// The input contradicts itself, the shape or the placement, `gather` still awaits outputs, or a lane is not
    /// held. All of these are found before anything is sent, so nothing is.
    pub fn write(
        &mut self,
        endpoint: &mut dyn Endpoint,
        placement: &Placement,
        key: StepKey,
        participants: &Participants,
        rows: Rows<'_>,
        expert_ids: &[u16],
        weights: &[f32],
        gather: &mut Gather,
    ) -> Result<(), ScatterError> {
        let n = self.check(
            endpoint,
            placement,
            key,
            participants,
            rows,
            expert_ids,
            weights,
            gather,
        )?;
        self.count(placement, key.layer, expert_ids)?;
        gather.begin(key, n, weights);
        self.sort(placement, key.layer, expert_ids, gather.places_mut());
        for &worker in placement.recipients(key.layer) {
            match self.send(
                endpoint,
                worker,
                key,
                participants,
                rows,
                placement,
                expert_ids,
                weights,
            ) {
                Ok((rows, assignments)) => gather.awaits(worker, rows, assignments),
                Err(ScatterError::Lane(LaneError::PeerLost { .. })) => gather.lost(worker),
                Err(error) => {
                    // Checked above, so this is a fabric that changed its mind; the exchange cannot complete.
                    gather.lost(worker);
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// Everything that can be refused before a byte is written. Returns the number of rows.
    fn check(
        &self,
        endpoint: &mut dyn Endpoint,
        placement: &Placement,
        key: StepKey,
        participants: &Participants,
        rows: Rows<'_>,
        expert_ids: &[u16],
        weights: &[f32],
        gather: &Gather,
    ) -> Result<u32, ScatterError> {
        let shape = &self.shape;
        let (hidden, top_k) = (shape.hidden as usize, usize::from(shape.top_k));
        let n = rows.len() / hidden;
        let same =
            rows.len() == n * hidden && expert_ids.len() == n * top_k && weights.len() == n * top_k;
        if !same {
            let (rows, ids, weights) = (rows.len(), expert_ids.len(), weights.len());
            return Err(ScatterError::Ragged {
                key,
                rows,
                hidden,
                ids,
                weights,
                top_k,
            });
        }
        let n = u32::try_from(n).unwrap_or(u32::MAX);
        if n > shape.max_rows {
            return Err(ScatterError::TooManyRows {
                key,
                rows: n,
                limit: shape.max_rows,
            });
        }
        if placement.epoch() != key.epoch
            || !placement.knows(key.layer)
            || placement.workers() != shape.expert_workers
        {
            return Err(ScatterError::Placement {
                key,
                epoch: placement.epoch().0,
                workers: placement.workers(),
            });
        }
        let sender = endpoint.id();
        let participates = participants.contains(sender.index) && sender.role == Role::Attention;
        if participants.workers() != shape.attention_workers || !participates {
            return Err(ScatterError::NotParticipant { key, sender });
        }
        if gather.micro_batch() != key.micro_batch {
            return Err(ScatterError::OtherMicroBatch {
                key,
                gather: gather.micro_batch(),
            });
        }
        if let Some(key) = gather.unfinished() {
            return Err(ScatterError::Unfinished { key });
        }
        for &worker in placement.recipients(key.layer) {
            match endpoint.slot(Lane::new(worker, key.micro_batch)) {
                Ok(_) | Err(LaneError::PeerLost { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(n)
    }

    /// Counts each worker's assignments and distinct rows.
    fn count(
        &mut self,
        placement: &Placement,
        layer: Layer,
        expert_ids: &[u16],
    ) -> Result<(), ScatterError> {
        self.start.fill(0);
        self.rows.fill(0);
        self.last.fill(u32::MAX);
        for (row, experts) in expert_ids.chunks_exact(self.shape.top_k.into()).enumerate() {
            for &expert in experts {
                let Some(owner) = placement.owner(layer, expert) else {
                    return Err(ScatterError::UnknownExpert {
                        row,
                        expert,
                        experts: placement.experts(),
                    });
                };
                let worker = usize::from(owner.worker);
                self.start[worker + 1] += 1;
                if self.last[worker] != row as u32 {
                    self.last[worker] = row as u32;
                    self.rows[worker] += 1;
                }
            }
        }
        for worker in 0..self.next.len() {
            self.next[worker] = self.start[worker];
            self.start[worker + 1] += self.start[worker];
        }
        Ok(())
    }

    /// Sorts the assignments by worker and notes where each one's output will stand.
    fn sort(
        &mut self,
        placement: &Placement,
        layer: Layer,
        expert_ids: &[u16],
        places: &mut [Place],
    ) {
        for (assignment, &expert) in expert_ids.iter().enumerate() {
            // Counted before, so it has an owner.
            let Some(owner) = placement.owner(layer, expert) else {
                continue;
            };
            let worker = usize::from(owner.worker);
            let at = self.next[worker];
            self.next[worker] += 1;
            self.order[at as usize] = assignment as u32;
            places[assignment] = Place {
                worker: owner.worker,
                index: at - self.start[worker],
            };
        }
    }

    /// Builds and posts one worker's frame; returns its rows and assignments.
    fn send(
        &self,
        endpoint: &mut dyn Endpoint,
        worker: u16,
        key: StepKey,
        participants: &Participants,
        rows: Rows<'_>,
        placement: &Placement,
        expert_ids: &[u16],
        weights: &[f32],
    ) -> Result<(u32, u32), ScatterError> {
        let lane = Lane::new(worker, key.micro_batch);
        let to = usize::from(worker);
        let order = &self.order[self.start[to] as usize..self.start[to + 1] as usize];
        let head = DispatchHead {
            key,
            sender: endpoint.id().index,
            element: self.shape.element,
            hidden: self.shape.hidden,
            rows: self.rows[to],
            assignments: order.len() as u32,
        };
        let mut frame =
            DispatchMut::lay_out(endpoint.slot(lane)?, head, participants).map_err(|source| {
                ScatterError::Frame {
                    key,
                    worker,
                    source,
                }
            })?;
        let (hidden, top_k) = (self.shape.hidden as usize, usize::from(self.shape.top_k));
        let (mut sent, mut last) = (0, usize::MAX);
        for (at, &assignment) in order.iter().enumerate() {
            let assignment = assignment as usize;
            let row = assignment / top_k;
            if row != last {
                frame.rows.set_row(sent, rows.row(row, hidden));
                (sent, last) = (sent + 1, row);
            }
            frame.row[at] = sent as u32 - 1;
            frame.expert[at] = placement
                .owner(key.layer, expert_ids[assignment])
                .map_or(0, |owner| owner.local);
            frame.weight[at] = weights[assignment];
        }
        let len = frame.len;
        endpoint.post(lane, len)?;
        Ok((head.rows, head.assignments))
    }
}

/// Why rows could not be sent.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum ScatterError {
    /// The lengths of rows, expert ids and weights do not belong together.
    #[error(
        "{key}: {rows} elements in rows of {hidden}, {ids} expert ids and {weights} weights for top-{top_k} do not belong together"
    )]
    Ragged {
        /// The exchange.
        key: StepKey,
        /// Elements given.
        rows: usize,
        /// Elements of a row.
        hidden: usize,
        /// Expert ids given.
        ids: usize,
        /// Weights given.
        weights: usize,
        /// Experts of each row.
        top_k: usize,
    },
    /// More rows than the slots were sized for.
    #[error(
        "{key}: {rows} rows are over the limit of {limit}: admit fewer sequences to the micro-batch"
    )]
    TooManyRows {
        /// The exchange.
        key: StepKey,
        /// Rows given.
        rows: u32,
        /// Most rows.
        limit: u32,
    },
    /// The placement is of another epoch, does not know the layer, or is for another number of workers.
    #[error(
        "{key}: the placement at hand is of epoch {epoch} for {workers} expert workers and does not fit"
    )]
    Placement {
        /// The exchange.
        key: StepKey,
        /// Epoch of the placement.
        epoch: u32,
        /// Expert workers of the placement.
        workers: u16,
    },
    /// The sender is not among the participants, or they are drawn from another number of workers.
    #[error("{key}: {sender} sends but is not among the participants")]
    NotParticipant {
        /// The exchange.
        key: StepKey,
        /// The sender.
        sender: WorkerId,
    },
    /// The gather is of another micro-batch.
    #[error("{key}: the outputs would go to the gather of {gather}")]
    OtherMicroBatch {
        /// The exchange.
        key: StepKey,
        /// Micro-batch of the gather.
        gather: MicroBatch,
    },
    /// The gather still awaits the outputs of an earlier exchange.
    #[error("{key} has not come back yet: a micro-batch has one exchange under way")]
    Unfinished {
        /// The exchange under way.
        key: StepKey,
    },
    /// The gate named an expert that is not in the placement.
    #[error("row {row} is routed to expert {expert}: the placement has {experts}")]
    UnknownExpert {
        /// The row.
        row: usize,
        /// The expert.
        expert: u16,
        /// Experts in the placement.
        experts: u16,
    },
    /// A frame did not fit its slot.
    #[error("{key}: the dispatch to expert-{worker} does not fit its slot: {source}")]
    Frame {
        /// The exchange.
        key: StepKey,
        /// The expert worker.
        worker: u16,
        /// What does not fit.
        source: FrameError,
    },
    /// A lane cannot be used.
    #[error(transparent)]
    Lane(#[from] LaneError),
}
