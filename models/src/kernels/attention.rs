//! Causal attention over a paged cache, by online softmax (Milakov and Gimelshein, arXiv 1805.02867).
//!
//! Positions are taken in steps of 64, at absolute multiples of 64 and in ascending order; so what a query does, step by
//! step, depends on its own position alone, not on the chunk of the prompt it came in or on how many queries share the step.
//!
//! In a block, for each key/value head, keys are stored `[tile][head_dim][16 positions]`, so that sixteen scores are one
//! vector and need no reduction, and values `[position][head_dim]`, padded to a multiple of sixteen elements.

use std::ops::Range;

use super::simd::{Kernel, Simd};
use super::{Isa, MatrixMut};

/// Positions whose keys are stored together. A block holds a multiple of them.
pub const TILE_POSITIONS: usize = 16;

/// One layer's keys or values of all blocks.
#[derive(Debug, Clone, Copy)]
pub enum KvSlice<'a> {
    /// f32.
    F32(&'a [f32]),
    /// Bits of bf16.
    Bf16(&'a [u16]),
}

/// Rows that belong to one sequence: consecutive positions, whose keys and values are in the cache already.
#[derive(Debug, Clone, Copy)]
pub struct Span<'a> {
    /// First of its rows.
    pub first_row: usize,
    /// How many rows.
    pub rows: usize,
    /// Position of the first.
    pub start: usize,
    /// Blocks of the sequence from position 0 on.
    pub blocks: &'a [u32],
}

/// One layer's attention, for any number of spans.
#[derive(Debug, Clone, Copy)]
pub struct PagedAttention<'a> {
    /// `[rows, query_stride]`; head `h` of a row stands at `h * head_dim`.
    pub queries: &'a [f32],
    /// Elements from one row's queries to the next's.
    pub query_stride: usize,
    /// The layer's keys, `[block][kv_head][tile][head_dim][16]`.
    pub keys: KvSlice<'a>,
    /// The layer's values, `[block][kv_head][position][padded head_dim]`; of the keys' type.
    pub values: KvSlice<'a>,
    /// Positions of a block.
    pub block_tokens: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Width of a head; even.
    pub head_dim: usize,
    /// Positions a query sees, its own included.
    pub window: Option<usize>,
    /// Factor on scores.
    pub scale: f32,
}

/// Room for the running state of one span's queries of one key/value head.
#[derive(Debug)]
pub struct AttentionScratch {
    queries: Vec<f32>,
    sums: Vec<f32>,
    largest: Vec<f32>,
    totals: Vec<f32>,
}

impl AttentionScratch {
    /// Room for spans of `rows` rows.
    pub fn new(rows: usize, heads_per_kv_head: usize, head_dim: usize) -> Self {
        let queries = rows * heads_per_kv_head;
        AttentionScratch {
            queries: vec![0.0; queries * head_dim],
            sums: vec![0.0; queries * padded(head_dim)],
            largest: vec![0.0; queries],
            totals: vec![0.0; queries],
        }
    }

    /// Bytes of that room; nothing if that overflows.
    pub fn bytes(rows: usize, heads_per_kv_head: usize, head_dim: usize) -> Option<usize> {
        let width = head_dim.checked_add(padded(head_dim))?.checked_add(2)?;
        rows.checked_mul(heads_per_kv_head)?
            .checked_mul(width)?
            .checked_mul(4)
    }
}

/// Elements of one position's values of one head.
pub(crate) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(16)
}

impl PagedAttention<'_> {
    /// Computes heads that belong to key/value heads `kv_heads` for the rows of `span`; `out` is
    /// `[rows of the span, those heads * head_dim]`.
    ///
    /// # Panics
    /// When a block table, a slice or the scratch is too short, or `head_dim` is odd.
    pub fn run(
        &self,
        isa: Isa,
        span: Span<'_>,
        kv_heads: Range<usize>,
        scratch: &mut AttentionScratch,
        out: MatrixMut<'_>,
    ) {
        let group = self.heads / self.kv_heads;
        assert!(
            self.head_dim.is_multiple_of(2) && self.block_tokens.is_multiple_of(TILE_POSITIONS)
        );
        assert!(kv_heads.end <= self.kv_heads && scratch.largest.len() >= span.rows * group);
        assert_eq!(
            (out.rows(), out.cols()),
            (span.rows, kv_heads.len() * group * self.head_dim)
        );
        if span.rows == 0 {
            return;
        }
        match (self.keys, self.values) {
            (KvSlice::F32(keys), KvSlice::F32(values)) => isa.run(Attend {
                of: self,
                keys,
                values,
                span,
                kv_heads,
                scratch,
                out,
            }),
            (KvSlice::Bf16(keys), KvSlice::Bf16(values)) => isa.run(Attend {
                of: self,
                keys,
                values,
                span,
                kv_heads,
                scratch,
                out,
            }),
            _ => panic!("keys and values are of one type"),
        }
    }
}

/// Tiles that one step of the online softmax takes in: enough to hide the latency of its maximum, exponential and sum.
const STEP_TILES: usize = 4;
const STEP_POSITIONS: usize = STEP_TILES * TILE_POSITIONS;
/// Steps that all queries of a span pass over before the next ones, while their keys and values are in the cache.
const STRIP_STEPS: usize = 4;

/// An element of the cache.
trait Element: Copy {
    fn load<S: Simd>(s: S, from: &[Self; 16]) -> S::V;
}

impl Element for f32 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[f32; 16]) -> S::V {
        s.load(from)
    }
}

impl Element for u16 {
    #[inline(always)]
    fn load<S: Simd>(s: S, from: &[u16; 16]) -> S::V {
        s.load_bf16(from)
    }
}

struct Attend<'a, E> {
    of: &'a PagedAttention<'a>,
    keys: &'a [E],
    values: &'a [E],
    span: Span<'a>,
    kv_heads: Range<usize>,
    scratch: &'a mut AttentionScratch,
    out: MatrixMut<'a>,
}

impl<E: Element> Kernel for Attend<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Attend {
            of,
            keys,
            values,
            span,
            kv_heads,
            scratch,
            mut out,
        } = self;
        let group = of.heads / of.kv_heads;
        let (dim, width) = (of.head_dim, padded(of.head_dim));
        let queries = span.rows * group;
        let last_step = (span.start + span.rows - 1) / STEP_POSITIONS;
        let first_step = oldest(span.start, of.window) / STEP_POSITIONS;
        let first_kv_head = kv_heads.start;
        for kv_head in kv_heads {
            scratch.sums[..queries * width].fill(0.0);
            scratch.largest[..queries].fill(f32::NEG_INFINITY);
            scratch.totals[..queries].fill(0.0);
            for bundle in bundles::<S>(queries) {
                for (place, query) in bundle.clone().enumerate() {
                    let (row, head) = (query / group, kv_head * group + query % group);
                    let from =
                        &of.queries[(span.first_row + row) * of.query_stride + head * dim..][..dim];
                    let to = &mut scratch.queries[bundle.start * dim..bundle.end * dim];
                    for (d, x) in from.iter().enumerate() {
                        to[d * bundle.len() + place] = x * of.scale;
                    }
                }
            }
            for strip in (first_step..=last_step).step_by(STRIP_STEPS) {
                let steps = strip..(strip + STRIP_STEPS).min(last_step + 1);
                for bundle in bundles::<S>(queries) {
                    let strip = Strip {
                        of,
                        keys,
                        values,
                        span,
                        kv_head,
                        group,
                        steps: steps.clone(),
                        queries: &scratch.queries[bundle.start * dim..bundle.end * dim],
                        sums: &mut scratch.sums[bundle.start * width..bundle.end * width],
                        largest: &mut scratch.largest[bundle.clone()],
                        totals: &mut scratch.totals[bundle.clone()],
                        first_query: bundle.start,
                    };
                    s.call(strip);
                }
            }
            for query in 0..queries {
                let (row, head) = (
                    query / group,
                    (kv_head - first_kv_head) * group + query % group,
                );
                let scale = 1.0 / scratch.totals[query];
                let to = &mut out.row(row)[head * dim..][..dim];
                for (to, sum) in to.iter_mut().zip(&scratch.sums[query * width..]) {
                    *to = sum * scale;
                }
            }
        }
    }
}

/// The oldest position that the query at `position` sees.
#[inline(always)]
fn oldest(position: usize, window: Option<usize>) -> usize {
    match window {
        Some(window) => (position + 1).saturating_sub(window),
        None => 0,
    }
}

/// Cuts queries into bundles of 8, 4, 2 and 1, not above what the instruction set has registers for.
fn bundles<S: Simd>(queries: usize) -> impl Iterator<Item = Range<usize>> {
    let mut first = 0;
    std::iter::from_fn(move || {
        let left = (queries - first).min(S::QUERIES);
        if left == 0 {
            return None;
        }
        let bundle = first..first + (1 << left.ilog2());
        first = bundle.end;
        Some(bundle)
    })
}

/// One bundle of queries over some steps of positions.
struct Strip<'a, E> {
    of: &'a PagedAttention<'a>,
    keys: &'a [E],
    values: &'a [E],
    span: Span<'a>,
    kv_head: usize,
    group: usize,
    steps: Range<usize>,
    /// `[head_dim][queries of the bundle]`, scaled.
    queries: &'a [f32],
    /// `[queries][padded head_dim]`: values weighted by `e^(score - largest)`.
    sums: &'a mut [f32],
    largest: &'a mut [f32],
    /// Sum of the weights.
    totals: &'a mut [f32],
    first_query: usize,
}

impl<E: Element> Kernel for Strip<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        match self.largest.len() {
            1 => self.bundle::<S, 1>(s),
            2 => self.bundle::<S, 2>(s),
            4 => self.bundle::<S, 4>(s),
            _ => self.bundle::<S, 8>(s),
        }
    }
}

impl<E: Element> Strip<'_, E> {
    #[inline(always)]
    fn bundle<S: Simd, const Q: usize>(&mut self, s: S) {
        let (dim, width) = (self.of.head_dim, padded(self.of.head_dim));
        let mut seen = [const { 0..0usize }; Q];
        for q in 0..Q {
            let position = self.span.start + (self.first_query + q) / self.group;
            seen[q] = oldest(position, self.of.window)..position + 1;
        }
        for step in self.steps.clone() {
            let first = step * STEP_POSITIONS;
            // Queries stand in the order of their positions: the first sees the oldest, the last the newest.
            let (from, to) = (
                first.max(seen[0].start),
                (first + STEP_POSITIONS).min(seen[Q - 1].end),
            );
            if from >= to {
                continue;
            }
            let tiles = from / TILE_POSITIONS..to.div_ceil(TILE_POSITIONS);
            let mut weights = [[f32::NEG_INFINITY; STEP_POSITIONS]; Q];
            for tile in tiles.clone() {
                let place = self.place(tile);
                let ahead = self.place(ahead(tile, &seen[Q - 1]));
                let scores = self.scores::<S, Q>(
                    s,
                    &self.keys[place * dim..][..TILE_POSITIONS * dim],
                    self.keys[ahead * dim..].as_ptr(),
                );
                for q in 0..Q {
                    let (lanes, _) = weights[q].as_chunks_mut::<16>();
                    s.store(scores[q], &mut lanes[tile % STEP_TILES]);
                }
            }
            for q in 0..Q {
                let seen = within(&seen[q], first, STEP_POSITIONS);
                if !seen.is_empty() {
                    self.weigh(s, &mut weights[q], q, seen);
                }
            }
            for tile in tiles {
                let first = tile * TILE_POSITIONS;
                let values = &self.values[self.place(tile) * width..][..TILE_POSITIONS * width];
                let whole = seen[0].end >= first + TILE_POSITIONS && seen[Q - 1].start <= first;
                let lanes = tile % STEP_TILES * TILE_POSITIONS;
                if whole {
                    let ahead = self.place(ahead(tile, &seen[Q - 1]));
                    let ahead = self.values[ahead * width..].as_ptr();
                    self.add_values::<S, Q>(s, values, ahead, &weights, lanes);
                } else {
                    for q in 0..Q {
                        // Only positions it sees: what stands at the others may be anything, even a NaN.
                        let seen = within(&seen[q], first, TILE_POSITIONS);
                        self.add_values_of_one(s, values, &weights[q][lanes..], q, seen);
                    }
                }
            }
        }
    }

    /// Where a tile of positions begins, in positions of one head from the start of the cache.
    #[inline(always)]
    fn place(&self, tile: usize) -> usize {
        let tiles_per_block = self.of.block_tokens / TILE_POSITIONS;
        let block = self.span.blocks[tile / tiles_per_block] as usize;
        (block * self.of.kv_heads + self.kv_head) * self.of.block_tokens
            + tile % tiles_per_block * TILE_POSITIONS
    }

    /// Turns scores into weights relative to the largest score so far, which shrinks earlier sums where it grows.
    #[inline(always)]
    fn weigh<S: Simd>(
        &mut self,
        s: S,
        weights: &mut [f32; STEP_POSITIONS],
        q: usize,
        seen: Range<usize>,
    ) {
        weights[..seen.start].fill(f32::NEG_INFINITY);
        weights[seen.end..].fill(f32::NEG_INFINITY);
        let (lanes, _) = weights.as_chunks_mut::<16>();
        let mut largest = s.load(&lanes[0]);
        for lanes in &lanes[1..] {
            largest = s.max(largest, s.load(lanes));
        }
        let largest = s.largest(largest);
        if largest > self.largest[q] {
            let shrink = s.exp(s.splat(self.largest[q] - largest));
            self.largest[q] = largest;
            let mut factor = [0.0; 16];
            s.store(shrink, &mut factor);
            self.totals[q] *= factor[0];
            let width = padded(self.of.head_dim);
            let (sums, _) = self.sums[q * width..][..width].as_chunks_mut::<16>();
            for sum in sums {
                s.store(s.mul(s.load(sum), shrink), sum);
            }
        }
        for lanes in &mut *lanes {
            let score = s.sub(s.load(lanes), s.splat(self.largest[q]));
            s.store(s.exp(score), lanes);
        }
        // The exponential of minus infinity is tiny, not zero.
        weights[..seen.start].fill(0.0);
        weights[seen.end..].fill(0.0);
        let (lanes, _) = weights.as_chunks::<16>();
        let mut total = s.load(&lanes[0]);
        for lanes in &lanes[1..] {
            total = s.add(total, s.load(lanes));
        }
        self.totals[q] += s.sum(total);
    }

    /// Sixteen scores a query, the sums of even and of odd elements apart: two chains.
    #[inline(always)]
    fn scores<S: Simd, const Q: usize>(&self, s: S, keys: &[E], ahead: *const E) -> [S::V; Q] {
        let (keys, _) = keys.as_chunks::<16>();
        let (keys, _) = keys.as_chunks::<2>();
        let (queries, _) = self.queries.as_chunks::<Q>();
        let (queries, _) = queries.as_chunks::<2>();
        let mut even = [s.splat(0.0); Q];
        let mut odd = [s.splat(0.0); Q];
        for (i, (key, query)) in keys.iter().zip(queries).enumerate() {
            let line = ahead.wrapping_add(i * 32).cast::<u32>();
            s.prefetch(line);
            if size_of::<E>() == 4 {
                s.prefetch(line.wrapping_add(16));
            }
            let (k0, k1) = (E::load(s, &key[0]), E::load(s, &key[1]));
            for q in 0..Q {
                even[q] = s.fma(k0, s.splat(query[0][q]), even[q]);
                odd[q] = s.fma(k1, s.splat(query[1][q]), odd[q]);
            }
        }
        for q in 0..Q {
            even[q] = s.add(even[q], odd[q]);
        }
        even
    }

    #[inline(always)]
    fn add_values<S: Simd, const Q: usize>(
        &mut self,
        s: S,
        values: &[E],
        ahead: *const E,
        weights: &[[f32; STEP_POSITIONS]; Q],
        lanes: usize,
    ) {
        let width = padded(self.of.head_dim);
        let mut d = 0;
        while d < width {
            if !S::NARROW && d + 32 <= width {
                self.add_columns::<S, Q, 2>(s, values, ahead, weights, lanes, d);
                d += 32;
            } else {
                self.add_columns::<S, Q, 1>(s, values, ahead, weights, lanes, d);
                d += 16;
            }
        }
    }

    /// Adds `C` times sixteen elements of the weighted values to every query's sums.
    #[inline(always)]
    fn add_columns<S: Simd, const Q: usize, const C: usize>(
        &mut self,
        s: S,
        values: &[E],
        ahead: *const E,
        weights: &[[f32; STEP_POSITIONS]; Q],
        lanes: usize,
        first: usize,
    ) {
        let width = padded(self.of.head_dim);
        let mut acc = [[s.splat(0.0); C]; Q];
        for q in 0..Q {
            let (sums, _) = self.sums[q * width + first..][..16 * C].as_chunks::<16>();
            for c in 0..C {
                acc[q][c] = s.load(&sums[c]);
            }
        }
        for t in 0..TILE_POSITIONS {
            let (row, _) = values[t * width + first..][..16 * C].as_chunks::<16>();
            let line = ahead.wrapping_add(t * width + first).cast::<u32>();
            s.prefetch(line);
            if C * size_of::<E>() == 8 {
                s.prefetch(line.wrapping_add(16));
            }
            let mut value = [s.splat(0.0); C];
            for c in 0..C {
                value[c] = E::load(s, &row[c]);
            }
            for q in 0..Q {
                let weight = s.splat(weights[q][lanes + t]);
                for c in 0..C {
                    acc[q][c] = s.fma(value[c], weight, acc[q][c]);
                }
            }
        }
        for q in 0..Q {
            let (sums, _) = self.sums[q * width + first..][..16 * C].as_chunks_mut::<16>();
            for c in 0..C {
                s.store(acc[q][c], &mut sums[c]);
            }
        }
    }

    #[inline(always)]
    fn add_values_of_one<S: Simd>(
        &mut self,
        s: S,
        values: &[E],
        weights: &[f32],
        q: usize,
        positions: Range<usize>,
    ) {
        let width = padded(self.of.head_dim);
        let (sums, _) = self.sums[q * width..][..width].as_chunks_mut::<16>();
        for (c, sum) in sums.iter_mut().enumerate() {
            let mut acc = s.load(sum);
            for t in positions.clone() {
                let (value, _) = values[t * width + c * 16..][..16].as_chunks::<16>();
                acc = s.fma(E::load(s, &value[0]), s.splat(weights[t]), acc);
            }
            s.store(acc, sum);
        }
    }
}

/// The tile whose keys and values to ask for while `tile` is worked on: a step ahead, if a query that sees `seen` will come to it.
#[inline(always)]
fn ahead(tile: usize, seen: &Range<usize>) -> usize {
    let ahead = tile + STEP_TILES;
    if ahead * TILE_POSITIONS < seen.end {
        ahead
    } else {
        tile
    }
}

/// The positions of the `len` from `first` on that fall into `seen`, counted from `first`.
#[inline(always)]
fn within(seen: &Range<usize>, first: usize, len: usize) -> Range<usize> {
    let end = seen.end.saturating_sub(first).min(len);
    seen.start.saturating_sub(first).min(end)..end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use crate::testing::Random;
    use candle_core::{Device, Tensor};
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn attention_is_the_references(
            (kv_heads, group) in (1usize..3, 1usize..7),
            half in 1usize..40,
            rows in 1usize..90,
            window in prop::option::of(1usize..100),
            big_blocks: bool,
            seed: u64,
        ) {
            let (heads, dim) = (kv_heads * group, 2 * half);
            let block_tokens = if big_blocks { 48 } else { 16 };
            let mut random = Random::new(seed);
            let queries = random.values(rows * heads * dim, 2.0);
            let keys = random.values(rows * kv_heads * dim, 2.0);
            let values = random.values(rows * kv_heads * dim, 2.0);

            // Blocks in falling order; what no query sees is NaN.
            let blocks: Vec<u32> = (0..rows.div_ceil(block_tokens) as u32).rev().collect();
            let width = padded(dim);
            let places = blocks.len() * block_tokens * kv_heads;
            let (mut cached_keys, mut cached_values) = (vec![f32::NAN; places * dim], vec![f32::NAN; places * width]);
            for position in 0..rows {
                let (block, slot) = (blocks[position / block_tokens] as usize, position % block_tokens);
                for head in 0..kv_heads {
                    let from = (position * kv_heads + head) * dim;
                    let first = (block * kv_heads + head) * block_tokens;
                    for d in 0..dim {
                        cached_keys[(first + slot / 16 * 16) * dim + d * 16 + slot % 16] = keys[from + d];
                        cached_values[(first + slot) * width + d] = values[from + d];
                    }
                }
            }
            let tensor = |x: &[f32], heads: usize| {
                let x = Tensor::from_slice(x, (rows, heads, dim), &Device::Cpu)?;
                x.transpose(0, 1)?.contiguous()
            };
            let expected = (|| {
                let (q, k, v) = (tensor(&queries, heads)?, tensor(&keys, kv_heads)?, tensor(&values, kv_heads)?);
                reference::attend(&q, &k, &v, window)?.transpose(0, 1)?.flatten_all()?.to_vec1::<f32>()
            })()
            .unwrap();
            let paged = PagedAttention {
                queries: &queries,
                query_stride: heads * dim,
                keys: KvSlice::F32(&cached_keys),
                values: KvSlice::F32(&cached_values),
                block_tokens,
                heads,
                kv_heads,
                head_dim: dim,
                window,
                scale: 1.0 / (dim as f32).sqrt(),
            };
            for isa in Isa::available() {
                let mut scratch = AttentionScratch::new(rows, group, dim);
                let mut out = vec![0.0; rows * heads * dim];
                let span = Span { first_row: 0, rows, start: 0, blocks: &blocks };
                let place = MatrixMut::new(&mut out, rows, heads * dim, heads * dim);
                paged.run(isa, span, 0..kv_heads, &mut scratch, place);
                for (a, b) in out.iter().zip(&expected) {
                    prop_assert!((a - b).abs() < 2e-5, "{isa:?} {a} {b}");
                }
                // One row and one key/value head at a time: the same bits.
                let mut apart = vec![0.0; out.len()];
                for row in 0..rows {
                    for head in 0..kv_heads {
                        let span = Span { first_row: row, rows: 1, start: row, blocks: &blocks };
                        let columns = group * dim;
                        let place = &mut apart[row * heads * dim + head * columns..][..columns];
                        paged.run(isa, span, head..head + 1, &mut scratch, MatrixMut::new(place, 1, columns, columns));
                    }
                }
                prop_assert!(out == apart, "{isa:?}");
            }
        }
    }
}
