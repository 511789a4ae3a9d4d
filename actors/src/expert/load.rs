//! How many rows each expert of each layer has computed: the ground for balancing.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters of every (layer, expert), shared by all expert workers of a cluster.
#[derive(Debug)]
pub struct ExpertLoad {
    experts: usize,
    rows: Vec<AtomicU64>,
}

impl ExpertLoad {
    /// Zeros.
    pub fn new(layers: usize, experts: usize) -> Self {
        ExpertLoad {
            experts,
            rows: (0..layers * experts).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    pub(crate) fn count(&self, layer: usize, expert: u16, rows: u32) {
        self.add(layer, expert, rows.into());
    }

    /// Rows that were computed elsewhere. What names no expert of ours is left out.
    pub(crate) fn add(&self, layer: usize, expert: u16, rows: u64) {
        if usize::from(expert) >= self.experts {
            return;
        }
        if let Some(counter) = self.rows.get(layer * self.experts + expert as usize) {
            counter.fetch_add(rows, Ordering::Relaxed);
        }
    }

    /// Rows so far, `[layer][expert]`. Dense layers have zeros.
    pub fn rows(&self) -> Vec<Vec<u64>> {
        let layer =
            |counters: &[AtomicU64]| counters.iter().map(|c| c.load(Ordering::Relaxed)).collect();
        self.rows.chunks(self.experts.max(1)).map(layer).collect()
    }
}
