//! Causal attention over a paged cache, by online softmax (Milakov and Gimelshein, arXiv 1805.02867).
//!
//! Positions are taken in tiles of sixteen, at absolute multiples of sixteen and in ascending order; so what a query does, step by
//! step, depends on its own position alone, not on the chunk of the prompt it came in or on how many queries share the tile.
//!
//! In a block, for each key/value head, keys are stored `[tile][head_dim][16 positions]`, so that sixteen scores are one
//! vector and need no reduction, and values `[position][head_dim]`, padded to a multiple of sixteen elements.

use std::ops::Range;

use super::simd::{Kernel, Simd};
use super::{Isa, MatrixMut};

/// Positions that one step of the online softmax takes in. A block holds a multiple of them.
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

/// Tiles of positions that all queries of a span pass over before the next ones, while they are in the cache.
const STRIP_TILES: usize = 16;

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
        let last_tile = (span.start + span.rows - 1) / TILE_POSITIONS;
        let first_tile = oldest(span.start, of.window) / TILE_POSITIONS;
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
            for strip in (first_tile..=last_tile).step_by(STRIP_TILES) {
                let tiles = strip..(strip + STRIP_TILES).min(last_tile + 1);
                for bundle in bundles::<S>(queries) {
                    let step = Strip {
                        of,
                        keys,
                        values,
                        span,
                        kv_head,
                        group,
                        tiles: tiles.clone(),
                        queries: &scratch.queries[bundle.start * dim..bundle.end * dim],
                        sums: &mut scratch.sums[bundle.start * width..bundle.end * width],
                        largest: &mut scratch.largest[bundle.clone()],
                        totals: &mut scratch.totals[bundle.clone()],
                        first_query: bundle.start,
                    };
                    s.call(step);
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

/// One bundle of queries over some tiles of positions.
struct Strip<'a, E> {
    of: &'a PagedAttention<'a>,
    keys: &'a [E],
    values: &'a [E],
    span: Span<'a>,
    kv_head: usize,
    group: usize,
    tiles: Range<usize>,
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
        let tiles_per_block = self.of.block_tokens / TILE_POSITIONS;
        for tile in self.tiles.clone() {
            let first = tile * TILE_POSITIONS;
            // Queries stand in the order of their positions: the first sees the oldest, the last the newest.
            if first >= seen[Q - 1].end {
                break;
            }
            if first + TILE_POSITIONS <= seen[0].start {
                continue;
            }
            let whole = seen[0].end >= first + TILE_POSITIONS && seen[Q - 1].start <= first;
            let block = self.span.blocks[tile / tiles_per_block] as usize;
            let place = (block * self.of.kv_heads + self.kv_head) * self.of.block_tokens
                + tile % tiles_per_block * TILE_POSITIONS;
            let keys = &self.keys[place * dim..][..TILE_POSITIONS * dim];
            let values = &self.values[place * width..][..TILE_POSITIONS * width];

            let scores = self.scores::<S, Q>(s, keys);
            let mut weights = [[0.0f32; TILE_POSITIONS]; Q];
            for q in 0..Q {
                let (lo, hi) = within(&seen[q], first);
                if lo >= hi {
                    continue;
                }
                let mut score = scores[q];
                if !whole {
                    score = s.keep(score, lo, hi, f32::NEG_INFINITY);
                }
                let largest = s.largest(score);
                if largest > self.largest[q] {
                    let shrink = s.exp(s.splat(self.largest[q] - largest));
                    self.largest[q] = largest;
                    let mut lanes = [0.0; 16];
                    s.store(shrink, &mut lanes);
                    self.totals[q] *= lanes[0];
                    let (sums, _) = self.sums[q * width..][..width].as_chunks_mut::<16>();
                    for sum in sums {
                        s.store(s.mul(s.load(sum), shrink), sum);
                    }
                }
                let mut weight = s.exp(s.sub(score, s.splat(self.largest[q])));
                if !whole {
                    weight = s.keep(weight, lo, hi, 0.0);
                }
                self.totals[q] += s.sum(weight);
                s.store(weight, &mut weights[q]);
            }
            if whole {
                self.add_values::<S, Q>(s, values, &weights);
            } else {
                for q in 0..Q {
                    let (lo, hi) = within(&seen[q], first);
                    // Only positions it sees: what stands at the others may be anything, even a NaN.
                    self.add_values_of_one(s, values, &weights[q], q, lo..hi);
                }
            }
        }
    }

    /// Sixteen scores a query, the sums of even and of odd elements apart: two chains.
    #[inline(always)]
    fn scores<S: Simd, const Q: usize>(&self, s: S, keys: &[E]) -> [S::V; Q] {
        let (keys, _) = keys.as_chunks::<16>();
        let (keys, _) = keys.as_chunks::<2>();
        let (queries, _) = self.queries.as_chunks::<Q>();
        let (queries, _) = queries.as_chunks::<2>();
        let mut even = [s.splat(0.0); Q];
        let mut odd = [s.splat(0.0); Q];
        for (key, query) in keys.iter().zip(queries) {
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
        weights: &[[f32; 16]; Q],
    ) {
        let width = padded(self.of.head_dim);
        let mut d = 0;
        while d < width {
            if !S::NARROW && d + 32 <= width {
                self.add_columns::<S, Q, 2>(s, values, weights, d);
                d += 32;
            } else {
                self.add_columns::<S, Q, 1>(s, values, weights, d);
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
        weights: &[[f32; 16]; Q],
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
            let mut value = [s.splat(0.0); C];
            for c in 0..C {
                value[c] = E::load(s, &row[c]);
            }
            for q in 0..Q {
                let weight = s.splat(weights[q][t]);
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
        weights: &[f32; 16],
        q: usize,
        positions: Range<usize>,
    ) {
        let width = padded(self.of.head_dim);
        let (sums, _) = self.sums[q * width..][..width].as_chunks_mut::<16>();
        for t in positions {
            let weight = s.splat(weights[t]);
            let (row, _) = values[t * width..][..width].as_chunks::<16>();
            for (sum, value) in sums.iter_mut().zip(row) {
                s.store(s.fma(E::load(s, value), weight, s.load(sum)), sum);
            }
        }
    }
}

/// The lanes of the tile at `first` that fall into `seen`.
#[inline(always)]
fn within(seen: &Range<usize>, first: usize) -> (usize, usize) {
    (
        seen.start.saturating_sub(first).min(TILE_POSITIONS),
        seen.end.saturating_sub(first).min(TILE_POSITIONS),
    )
}
