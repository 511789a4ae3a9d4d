//! Which expert worker holds which expert.

use crate::{Epoch, Layer};

/// One copy of an expert: the worker that holds it, and its index among that worker's experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Index of the expert worker.
    pub worker: u16,
    /// Index among the experts that the worker holds at that layer, in ascending order of the expert.
    pub local: u16,
}

/// The map from experts to expert workers, for one epoch.
///
/// Local indices follow from the map alone: the experts of a worker, ascending, are numbered from zero. So attention
/// and expert workers that know the same map agree without a word. An expert may have several owners (replicas);
/// rows go to the first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    epoch: Epoch,
    experts: u16,
    workers: u16,
    /// One map for all layers, or one for each.
    layers: Box<[LayerMap]>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct LayerMap {
    /// `[experts + 1]`: owners of expert `e` are `owners[start[e]..start[e + 1]]`.
    start: Box<[u32]>,
    owners: Box<[Owner]>,
    /// `[workers + 1]`: experts of worker `w` are `held[held_start[w]..held_start[w + 1]]`, ascending.
    held_start: Box<[u32]>,
    held: Box<[u16]>,
    /// Workers that hold anything, ascending.
    recipients: Box<[u16]>,
}

impl Placement {
    /// Contiguous ranges of experts, the same at all layers, as even as can be: the first `experts % workers` workers
    /// hold one more. With more workers than experts the last workers hold none.
    ///
    /// # Errors
    /// There are no experts or no workers.
    pub fn even(epoch: Epoch, experts: u16, workers: u16) -> Result<Self, PlacementError> {
        if experts == 0 || workers == 0 {
            return Err(PlacementError::Empty { experts, workers });
        }
        let (each, more) = (experts / workers, experts % workers);
        let owners = (0..workers).flat_map(|worker| {
            let count = each + u16::from(worker < more);
            std::iter::repeat_n(vec![worker], count.into())
        });
        Self::from_owners(epoch, workers, &[owners.collect()])
    }

    /// A map given as `layers[layer][expert]` = workers that hold it, the one to send to first. One layer stands for
    /// all.
    ///
    /// # Errors
    /// Something is empty, layers differ in their number of experts, an expert has no owner, an unknown one, or the
    /// same twice.
    pub fn from_owners(
        epoch: Epoch,
        workers: u16,
        layers: &[Vec<Vec<u16>>],
    ) -> Result<Self, PlacementError> {
        let count = layers.first().map_or(0, Vec::len);
        let experts =
            u16::try_from(count).map_err(|_| PlacementError::TooMany { experts: count })?;
        if experts == 0 || workers == 0 {
            return Err(PlacementError::Empty { experts, workers });
        }
        let maps = layers.iter().enumerate().map(|(layer, owners)| {
            if owners.len() != count {
                return Err(PlacementError::Ragged {
                    layer,
                    experts: owners.len(),
                    expected: count,
                });
            }
            LayerMap::new(workers, owners, layer)
        });
        Ok(Self {
            epoch,
            experts,
            workers,
            layers: maps.collect::<Result<_, _>>()?,
        })
    }

    /// The same map under another epoch.
    pub fn at_epoch(mut self, epoch: Epoch) -> Self {
        self.epoch = epoch;
        self
    }

    /// Version of this map.
    pub const fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Number of experts of a layer.
    pub const fn experts(&self) -> u16 {
        self.experts
    }

    /// Number of expert workers, also of those that hold nothing.
    pub const fn workers(&self) -> u16 {
        self.workers
    }

    /// Whether the map knows the layer. A map for all layers knows any.
    pub fn knows(&self, layer: Layer) -> bool {
        self.map(layer).is_some()
    }

    /// All owners of an expert, the one to send to first; empty for an unknown layer or expert.
    pub fn owners(&self, layer: Layer, expert: u16) -> &[Owner] {
        self.map(layer)
            .and_then(|map| map.owners_of(expert))
            .unwrap_or_default()
    }

    /// The owner that rows for this expert go to; none for an unknown layer or expert.
    pub fn owner(&self, layer: Layer, expert: u16) -> Option<Owner> {
        self.owners(layer, expert).first().copied()
    }

    /// The experts that a worker holds, in the order of their local index; empty for an unknown layer or worker.
    pub fn local_experts(&self, layer: Layer, worker: u16) -> &[u16] {
        self.map(layer)
            .and_then(|map| map.held_by(worker))
            .unwrap_or_default()
    }

    /// Most experts that a worker holds at any layer.
    pub fn max_local_experts(&self, worker: u16) -> u16 {
        let counts = self
            .layers
            .iter()
            .map(|map| map.held_by(worker).unwrap_or_default().len());
        // No more than there are experts, which are counted in a u16.
        counts.max().unwrap_or(0) as u16
    }

    /// The expert workers that take part at a layer: those that hold any expert, ascending. Every participant sends
    /// to each of them, be it an empty frame; a worker that holds nothing has nothing to fire.
    pub fn recipients(&self, layer: Layer) -> &[u16] {
        self.map(layer).map_or(&[], |map| &map.recipients)
    }

    fn map(&self, layer: Layer) -> Option<&LayerMap> {
        match &*self.layers {
            [all] => Some(all),
            layers => layers.get(usize::from(layer.0)),
        }
    }
}

impl LayerMap {
    fn new(workers: u16, owners: &[Vec<u16>], layer: usize) -> Result<Self, PlacementError> {
        let mut held = vec![Vec::new(); workers.into()];
        let mut flat = Vec::new();
        let mut start = vec![0];
        for (expert, owners) in owners.iter().enumerate() {
            let expert = expert as u16; // counted in a u16 by the caller
            if owners.is_empty() {
                return Err(PlacementError::NoOwner { layer, expert });
            }
            for (rank, &worker) in owners.iter().enumerate() {
                let Some(held) = held.get_mut(usize::from(worker)) else {
                    return Err(PlacementError::UnknownWorker {
                        layer,
                        expert,
                        worker,
                        workers,
                    });
                };
                if owners[..rank].contains(&worker) {
                    return Err(PlacementError::Twice {
                        layer,
                        expert,
                        worker,
                    });
                }
                flat.push(Owner {
                    worker,
                    local: held.len() as u16,
                });
                held.push(expert);
            }
            start.push(flat.len() as u32);
        }
        let mut held_start = vec![0];
        held_start.extend(held.iter().scan(0, |sum, held| {
            *sum += held.len() as u32;
            Some(*sum)
        }));
        let recipients = (0..workers).filter(|&worker| !held[usize::from(worker)].is_empty());
        Ok(Self {
            start: start.into(),
            owners: flat.into(),
            held_start: held_start.into(),
            recipients: recipients.collect(),
            held: held.concat().into(),
        })
    }

    fn owners_of(&self, expert: u16) -> Option<&[Owner]> {
        ranged(&self.owners, &self.start, expert)
    }

    fn held_by(&self, worker: u16) -> Option<&[u16]> {
        ranged(&self.held, &self.held_start, worker)
    }
}

fn ranged<'a, T>(items: &'a [T], start: &[u32], index: u16) -> Option<&'a [T]> {
    let bounds = start.get(usize::from(index)..usize::from(index) + 2)?;
    items.get(bounds[0] as usize..bounds[1] as usize)
}

/// Why a map from experts to workers makes no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// No experts or no workers.
    #[error(
        "a placement of {experts} experts on {workers} expert workers: each must be at least 1"
    )]
    Empty {
        /// Number of experts.
        experts: u16,
        /// Number of expert workers.
        workers: u16,
    },
    /// Experts are numbered with 16 bits.
    #[error("a placement of {experts} experts: at most 65535 can be numbered")]
    TooMany {
        /// Number of experts.
        experts: usize,
    },
    /// Layers differ in their number of experts.
    #[error("layer {layer} of the placement has {experts} experts where the first has {expected}")]
    Ragged {
        /// The layer.
        layer: usize,
        /// Its experts.
        experts: usize,
        /// Experts of the first layer.
        expected: usize,
    },
    /// An expert is nowhere.
    #[error("layer {layer} expert {expert} has no owner: give it to at least one expert worker")]
    NoOwner {
        /// The layer.
        layer: usize,
        /// The expert.
        expert: u16,
    },
    /// An owner is not in the deployment.
    #[error(
        "layer {layer} expert {expert} is given to expert-{worker}: there are {workers} expert workers"
    )]
    UnknownWorker {
        /// The layer.
        layer: usize,
        /// The expert.
        expert: u16,
        /// The unknown worker.
        worker: u16,
        /// Number of expert workers.
        workers: u16,
    },
    /// A worker would hold the same expert twice.
    #[error("layer {layer} expert {expert} is given to expert-{worker} twice")]
    Twice {
        /// The layer.
        layer: usize,
        /// The expert.
        expert: u16,
        /// The worker.
        worker: u16,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: Layer = Layer(17);

    #[test]
    fn even_ranges_divisible_or_not() {
        let placement = Placement::even(Epoch(1), 8, 3).unwrap();
        assert_eq!(placement.local_experts(ANY, 0), [0, 1, 2]);
        assert_eq!(placement.local_experts(ANY, 1), [3, 4, 5]);
        assert_eq!(placement.local_experts(ANY, 2), [6, 7]);
        assert_eq!(
            placement.owner(ANY, 7),
            Some(Owner {
                worker: 2,
                local: 1
            })
        );
        assert_eq!(placement.owner(ANY, 8), None);
        assert_eq!(placement.max_local_experts(2), 2);
    }

    #[test]
    fn more_workers_than_experts_leave_some_without() {
        let placement = Placement::even(Epoch(1), 2, 4).unwrap();
        assert_eq!(placement.recipients(ANY), [0, 1]);
        assert!(placement.local_experts(ANY, 3).is_empty());
        assert!(placement.local_experts(ANY, 9).is_empty());
    }

    #[test]
    fn replicas_and_layers_have_local_indices_of_their_own() {
        let layers = [
            vec![vec![1, 0], vec![1], vec![0, 1]],
            vec![vec![0], vec![0], vec![0]],
        ];
        let placement = Placement::from_owners(Epoch(4), 2, &layers).unwrap();
        let owners = [
            Owner {
                worker: 0,
                local: 1,
            },
            Owner {
                worker: 1,
                local: 2,
            },
        ];
        assert_eq!(placement.owners(Layer(0), 2), owners);
        assert_eq!(placement.local_experts(Layer(0), 1), [0, 1, 2]);
        assert_eq!(placement.recipients(Layer(1)), [0]);
        assert!(!placement.knows(Layer(2)));
        assert_eq!(placement.owner(Layer(2), 0), None);
    }

    #[test]
    fn maps_that_make_no_sense_are_refused() {
        let of =
            |owners: Vec<Vec<u16>>| Placement::from_owners(Epoch(0), 2, &[owners]).unwrap_err();
        assert_eq!(
            of(vec![vec![0], vec![]]),
            PlacementError::NoOwner {
                layer: 0,
                expert: 1
            }
        );
        assert_eq!(
            of(vec![vec![2]]),
            PlacementError::UnknownWorker {
                layer: 0,
                expert: 0,
                worker: 2,
                workers: 2
            }
        );
        assert_eq!(
            of(vec![vec![1, 1]]),
            PlacementError::Twice {
                layer: 0,
                expert: 0,
                worker: 1
            }
        );
        assert_eq!(
            of(vec![]),
            PlacementError::Empty {
                experts: 0,
                workers: 2
            }
        );
        let ragged = Placement::from_owners(Epoch(0), 1, &[vec![vec![0]], vec![]]).unwrap_err();
        assert_eq!(
            ragged,
            PlacementError::Ragged {
                layer: 1,
                experts: 0,
                expected: 1
            }
        );
    }
}
