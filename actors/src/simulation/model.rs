//! A model that costs nothing and knows when it was computed wrongly.
//!
//! A row is four numbers below 2^16, exact in f32 and in every sum of it. Attention reads the cache at the position before, where the history up to
//! there is hashed, and writes its own; the gate and the experts are hashes of the row. So a token depends on every token before it, on every layer's
//! experts and on the whole KV cache: what is computed twice in the wrong place, left out, merged wrongly or read from a block that is not the
//! sequence's gives another token. Placement, company and order give none.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use volley_models::kernels::Rows as KernelRows;
use volley_models::{ComputeType, ModuleError, SequenceSlice};
use volley_transports::Rows;

use crate::attention::{AttentionCompute, Outline, Routed};
use crate::expert::ExpertCompute;
use crate::request::{FinishReason, Request};

/// Numbers of a row.
pub(crate) const HIDDEN: usize = 4;

/// The sizes of the model.
#[derive(Debug, Clone)]
pub(crate) struct HashModel {
    pub(crate) layers: usize,
    pub(crate) experts: u16,
    pub(crate) top_k: usize,
    pub(crate) vocab: usize,
    /// Shares of the rows that visit each expert, summed up: `[experts]`. Empty: all alike.
    pub(crate) popularity: Arc<[f64]>,
}

impl HashModel {
    /// What the loops have to know.
    pub(crate) fn outline(&self) -> Outline {
        Outline {
            hidden: HIDDEN,
            vocab: self.vocab,
            routed: vec![true; self.layers],
        }
    }

    /// What a client must see, computed one token after the other in one place.
    pub(crate) fn answer(&self, request: &Request) -> (Vec<u32>, FinishReason) {
        let mut cache = vec![0; self.layers];
        let mut tokens = request.prompt.clone();
        let mut output = Vec::new();
        let mut ids = vec![0; self.top_k];
        let mut weights = vec![0.0; self.top_k];
        let mut position = 0;
        loop {
            let mut row = embed(tokens[position], position as u32);
            for (layer, history) in cache.iter_mut().enumerate() {
                *history = self.attend(layer, &mut row, *history, &mut ids, &mut weights);
                let mut sum = [0.0; HIDDEN];
                for (&expert, &weight) in ids.iter().zip(&weights) {
                    let y = expert_output(layer, expert, pack(&row));
                    sum.iter_mut()
                        .zip(y)
                        .for_each(|(sum, y)| *sum += weight * y);
                }
                add(&mut row, &sum);
            }
            position += 1;
            if position < tokens.len() {
                continue;
            }
            if output.len() == request.max_tokens as usize {
                return (output, FinishReason::Length);
            }
            let token = self.token(&row);
            output.push(token);
            tokens.push(token);
            if request.stop_tokens.contains(&token) {
                return (output, FinishReason::Stop);
            }
        }
    }

    /// One row's attention and gate in one layer; `before` is the history up to the position before. Returns the history with this row.
    fn attend(
        &self,
        layer: usize,
        row: &mut [f32; HIDDEN],
        before: u64,
        ids: &mut [u16],
        weights: &mut [f32],
    ) -> u64 {
        let history = mix(before ^ mix(pack(row) ^ (layer as u64) << 56));
        add(row, &spread(history));
        let mut seed = pack(row);
        for rank in 0..ids.len() {
            seed = mix(seed);
            let mut expert = self.draw(seed);
            while ids[..rank].contains(&expert) {
                expert = (expert + 1) % self.experts;
            }
            ids[rank] = expert;
            weights[rank] = (1 + seed % 3) as f32;
        }
        history
    }

    fn draw(&self, seed: u64) -> u16 {
        if self.popularity.is_empty() {
            return (seed % u64::from(self.experts)) as u16;
        }
        let at = (seed >> 11) as f64 / (1u64 << 53) as f64;
        let found = self.popularity.partition_point(|&sum| sum <= at);
        found.min(usize::from(self.experts) - 1) as u16
    }

    fn token(&self, row: &[f32; HIDDEN]) -> u32 {
        (mix(pack(row)) % self.vocab as u64) as u32
    }
}

/// The attention side of the model on one worker.
pub(crate) struct HashAttention {
    model: HashModel,
    block_tokens: usize,
    /// `[layers][blocks * block_tokens]`: the history up to that position.
    cache: Vec<Vec<u64>>,
}

/// One micro-batch of it.
#[derive(Default)]
pub(crate) struct HashBatch {
    rows: Vec<PlacedRow>,
    residual: Vec<f32>,
    ids: Vec<u16>,
    weights: Vec<f32>,
}

struct PlacedRow {
    token: u32,
    position: u32,
    /// Where its history goes.
    slot: usize,
    /// Where the history before it is.
    before: Option<usize>,
}

impl HashAttention {
    pub(crate) fn new(model: HashModel, blocks: u32, block_tokens: u32) -> Self {
        let slots = (blocks * block_tokens) as usize;
        HashAttention {
            cache: vec![vec![0; slots]; model.layers],
            block_tokens: block_tokens as usize,
            model,
        }
    }
}

impl AttentionCompute for HashAttention {
    type Batch = HashBatch;

    fn begin<'s>(
        &mut self,
        batch: &mut HashBatch,
        sequences: impl Iterator<Item = SequenceSlice<'s>> + Clone,
    ) -> Result<(), ModuleError> {
        batch.rows.clear();
        for sequence in sequences {
            let slot = |position: usize| {
                let block = sequence.blocks[position / self.block_tokens] as usize;
                block * self.block_tokens + position % self.block_tokens
            };
            for (&token, position) in sequence.tokens.iter().zip(sequence.start as usize..) {
                batch.rows.push(PlacedRow {
                    token,
                    position: position as u32,
                    slot: slot(position),
                    before: position.checked_sub(1).map(slot),
                });
            }
        }
        batch.residual.resize(batch.rows.len() * HIDDEN, 0.0);
        batch.ids.resize(batch.rows.len() * self.model.top_k, 0);
        batch
            .weights
            .resize(batch.rows.len() * self.model.top_k, 0.0);
        Ok(())
    }

    fn embed(&mut self, batch: &mut HashBatch) {
        let (residual, _) = batch.residual.as_chunks_mut::<HIDDEN>();
        for (row, residual) in batch.rows.iter().zip(residual) {
            *residual = embed(row.token, row.position);
        }
    }

    fn attention(&mut self, layer: usize, batch: &mut HashBatch) {
        let k = self.model.top_k;
        let (residual, _) = batch.residual.as_chunks_mut::<HIDDEN>();
        let chosen = batch
            .ids
            .chunks_exact_mut(k)
            .zip(batch.weights.chunks_exact_mut(k));
        let cache = &mut self.cache[layer];
        for ((row, residual), (ids, weights)) in batch.rows.iter().zip(residual).zip(chosen) {
            let before = row.before.map_or(0, |slot| cache[slot]);
            cache[row.slot] = self.model.attend(layer, residual, before, ids, weights);
        }
    }

    fn add_ffn(&mut self, batch: &mut HashBatch, ffn_out: &[f32]) {
        let (residual, _) = batch.residual.as_chunks_mut::<HIDDEN>();
        let (sums, _) = ffn_out.as_chunks::<HIDDEN>();
        residual
            .iter_mut()
            .zip(sums)
            .for_each(|(row, sum)| add(row, sum));
    }

    fn logits(
        &mut self,
        batch: &HashBatch,
        rows: &[u32],
        out: &mut [f32],
    ) -> Result<(), ModuleError> {
        let (residual, _) = batch.residual.as_chunks::<HIDDEN>();
        out.fill(0.0);
        for (&row, out) in rows.iter().zip(out.chunks_exact_mut(self.model.vocab)) {
            out[self.model.token(&residual[row as usize]) as usize] = 1.0;
        }
        Ok(())
    }

    fn routed<'a>(&self, batch: &'a HashBatch, _: ComputeType) -> Routed<'a> {
        Routed {
            rows: Rows::F32(&batch.residual),
            expert_ids: &batch.ids,
            expert_weights: &batch.weights,
        }
    }
}

/// The experts that one worker holds.
pub(crate) struct HashExperts {
    home: BTreeSet<u16>,
    adopted: BTreeSet<u16>,
    /// Raised when rows come for an expert that is not held: a token was routed to a replica that is not filled.
    unfilled: Arc<AtomicBool>,
}

impl HashExperts {
    pub(crate) fn new(home: impl IntoIterator<Item = u16>, unfilled: Arc<AtomicBool>) -> Self {
        HashExperts {
            home: home.into_iter().collect(),
            adopted: BTreeSet::new(),
            unfilled,
        }
    }
}

impl ExpertCompute for HashExperts {
    fn forward(
        &mut self,
        layer: usize,
        experts: &[u16],
        offsets: &[u32],
        x: KernelRows<'_>,
        out: &mut [f32],
    ) -> Result<(), ModuleError> {
        let held = |expert: &u16| self.home.contains(expert) || self.adopted.contains(expert);
        let mut groups = experts.iter().zip(offsets.windows(2));
        if let Some((&expert, _)) = groups.find(|(expert, rows)| rows[0] < rows[1] && !held(expert))
        {
            self.unfilled.store(true, Ordering::Relaxed);
            return Err(ModuleError::NotHeld { expert });
        }
        let KernelRows::F32(x) = x else {
            return Err(ModuleError::Layer { layer });
        };
        let ((x, _), (out, _)) = (x.as_chunks::<HIDDEN>(), out.as_chunks_mut::<HIDDEN>());
        for (&expert, range) in experts.iter().zip(offsets.windows(2)) {
            let range = range[0] as usize..range[1] as usize;
            for (x, out) in x[range.clone()].iter().zip(&mut out[range]) {
                *out = expert_output(layer, expert, pack(x));
            }
        }
        Ok(())
    }

    fn adopt(&mut self, experts: &[u16]) -> Result<(), ModuleError> {
        let fresh = experts.iter().filter(|expert| !self.home.contains(expert));
        self.adopted = fresh.copied().collect();
        Ok(())
    }

    fn holds(&self) -> Vec<u16> {
        self.home.union(&self.adopted).copied().collect()
    }
}

fn embed(token: u32, position: u32) -> [f32; HIDDEN] {
    spread(mix(u64::from(token) << 32 | u64::from(position)))
}

fn expert_output(layer: usize, expert: u16, x: u64) -> [f32; HIDDEN] {
    spread(mix(x ^ mix((layer as u64) << 32 | u64::from(expert))))
}

fn add(row: &mut [f32; HIDDEN], sum: &[f32; HIDDEN]) {
    let wrap = |a: f32, b: f32| ((a as u64 + b as u64) & 0xffff) as f32;
    row.iter_mut()
        .zip(sum)
        .for_each(|(row, &sum)| *row = wrap(*row, sum));
}

fn pack(row: &[f32; HIDDEN]) -> u64 {
    row.iter()
        .fold(0, |packed, &value| packed << 16 | value as u64)
}

fn spread(hash: u64) -> [f32; HIDDEN] {
    [48, 32, 16, 0].map(|shift| (hash >> shift & 0xffff) as f32)
}

/// A well-mixed 64-bit number (the finaliser of SplitMix64).
pub(super) fn mix(seed: u64) -> u64 {
    let seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let seed = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let seed = (seed ^ (seed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    seed ^ (seed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> HashModel {
        HashModel {
            layers: 3,
            experts: 5,
            top_k: 2,
            vocab: 97,
            popularity: Arc::new([]),
        }
    }

    #[test]
    fn a_token_depends_on_every_token_before_it() {
        let model = model();
        let prompt: Vec<u32> = (0..20).collect();
        let answer = |prompt: &[u32]| model.answer(&Request::greedy(prompt.to_vec(), 8)).0;
        let whole = answer(&prompt);
        assert_eq!(whole.len(), 8);
        for position in 0..prompt.len() {
            let mut other = prompt.clone();
            other[position] += 1;
            assert_ne!(answer(&other), whole, "position {position}");
        }
    }

    #[test]
    fn popularity_is_followed() {
        let mut model = model();
        model.popularity = Arc::new([0.7, 0.8, 0.9, 0.95, 1.0]);
        let draws = (0..10_000).map(|seed| model.draw(mix(seed)));
        let first = draws.filter(|&expert| expert == 0).count();
        assert!((6_700..7_300).contains(&first), "{first}");
    }

    #[test]
    fn experts_that_are_not_held_are_noticed() {
        let unfilled = Arc::new(AtomicBool::new(false));
        let mut experts = HashExperts::new([0, 1], Arc::clone(&unfilled));
        let x = [1.0, 2.0, 3.0, 4.0];
        let mut y = [0.0; HIDDEN];
        let mut forward = |experts: &mut HashExperts, expert| {
            experts
                .forward(0, &[expert], &[0, 1], KernelRows::F32(&x), &mut y)
                .is_ok()
        };
        assert!(forward(&mut experts, 1));
        experts.adopt(&[1, 4]).unwrap();
        assert_eq!(experts.holds(), [0, 1, 4]);
        assert!(forward(&mut experts, 4) && !unfilled.load(Ordering::Relaxed));
        experts.adopt(&[]).unwrap();
        assert!(!forward(&mut experts, 4) && unfilled.load(Ordering::Relaxed));
    }
}
