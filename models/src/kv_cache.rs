//! The paged cache of keys and values of an attention worker.
//!
//! Per layer, `[block][kv_head]` and then, for keys `[tile of 16 positions][head_dim][16]`, for values
//! `[position][head_dim padded to 16]` (see `kernels/attention.rs` for why). Which sequence owns a block is the scheduler's business.

#![allow(unsafe_code)]

use std::marker::PhantomData;

use crate::ModelSpec;
use crate::crew::{Member, Parts};
use crate::dtype::ComputeType;
use crate::kernels::{
    Arena, ArenaBlock, Isa, KvSlice, TILE_POSITIONS, bf16_bits, padded, round_to_bf16,
};

/// Keys and values of every layer.
#[derive(Debug)]
pub(crate) struct KvCache {
    layers: Vec<LayerCache>,
    shape: Shape,
}

#[derive(Debug)]
struct LayerCache {
    keys: ArenaBlock,
    values: ArenaBlock,
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    isa: Isa,
    dtype: ComputeType,
    blocks: usize,
    block_tokens: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl KvCache {
    /// A cache of zeros. `block_tokens` is a multiple of sixteen.
    pub(crate) fn new(
        isa: Isa,
        spec: &ModelSpec,
        dtype: ComputeType,
        blocks: usize,
        block_tokens: usize,
        crew: &mut Member,
    ) -> Self {
        let bytes = Self::bytes(spec, dtype, blocks, block_tokens).expect("sizes were checked");
        let shape = Shape {
            isa,
            dtype,
            blocks,
            block_tokens,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
        };
        let mut arena = Arena::new(bytes, crew);
        let [keys, values] = words(spec, dtype, blocks, block_tokens).expect("sizes were checked");
        let layers = (0..spec.layers.len())
            .map(|_| LayerCache {
                keys: arena.block(keys),
                values: arena.block(values),
            })
            .collect();
        KvCache { layers, shape }
    }

    /// Bytes of such a cache; nothing if that overflows.
    pub(crate) fn bytes(
        spec: &ModelSpec,
        dtype: ComputeType,
        blocks: usize,
        block_tokens: usize,
    ) -> Option<usize> {
        let [keys, values] = words(spec, dtype, blocks, block_tokens)?;
        Arena::block_bytes(keys)?
            .checked_add(Arena::block_bytes(values)?)?
            .checked_mul(spec.layers.len())
    }

    pub(crate) fn block_tokens(&self) -> usize {
        self.shape.block_tokens
    }

    /// Keys of a layer.
    pub(crate) fn keys(&self, layer: usize) -> KvSlice<'_> {
        self.shape.view(&self.layers[layer].keys)
    }

    /// Values of a layer.
    pub(crate) fn values(&self, layer: usize) -> KvSlice<'_> {
        self.shape.view(&self.layers[layer].values)
    }

    /// A layer cut by key/value head, for threads that each fill in one.
    pub(crate) fn heads(&mut self, layer: usize) -> CacheHeads<'_> {
        let LayerCache { keys, values } = &mut self.layers[layer];
        CacheHeads {
            keys: keys.as_mut_ptr(),
            values: values.as_mut_ptr(),
            shape: self.shape,
            data: PhantomData,
        }
    }
}

/// See [`KvCache::heads`].
pub(crate) struct CacheHeads<'a> {
    keys: *mut u32,
    values: *mut u32,
    shape: Shape,
    data: PhantomData<&'a mut [u32]>,
}

/// One key/value head of every block of a layer.
pub(crate) struct CacheHead<'a> {
    keys: *mut u32,
    values: *mut u32,
    head: usize,
    shape: Shape,
    data: PhantomData<&'a mut [u32]>,
}

// SAFETY: threads get disjoint parts of an exclusive borrow.
unsafe impl Sync for CacheHeads<'_> {}

// SAFETY: heads of a block do not overlap, nor do blocks.
unsafe impl<'a> Parts for CacheHeads<'a> {
    type Part = CacheHead<'a>;

    fn count(&self) -> usize {
        self.shape.kv_heads
    }

    unsafe fn part(&self, head: usize) -> CacheHead<'a> {
        CacheHead {
            keys: self.keys,
            values: self.values,
            head,
            shape: self.shape,
            data: PhantomData,
        }
    }
}

impl CacheHead<'_> {
    /// Stores one position's key and value, `[head_dim]` each.
    ///
    /// # Panics
    /// When there is no such block or slot, or the widths are others.
    pub(crate) fn write(&mut self, block: u32, slot: usize, key: &[f32], value: &[f32]) {
        let shape = self.shape;
        assert!((block as usize) < shape.blocks && slot < shape.block_tokens);
        assert!(key.len() == shape.head_dim && value.len() == shape.head_dim);
        match shape.dtype {
            ComputeType::F32 => {
                let (keys, values) = self.of_block::<f32>(block);
                scatter(keys, slot, key.iter().copied());
                values[slot * padded(shape.head_dim)..][..value.len()].copy_from_slice(value);
            }
            ComputeType::Bf16 => {
                let (keys, values) = self.of_block::<u16>(block);
                scatter(keys, slot, key.iter().map(|x| bf16_bits(*x)));
                let place = &mut values[slot * padded(shape.head_dim)..][..value.len()];
                round_to_bf16(shape.isa, value, place);
            }
        }
    }

    /// The head's keys and values in a block.
    fn of_block<E>(&mut self, block: u32) -> (&mut [E], &mut [E]) {
        let Shape {
            block_tokens,
            kv_heads,
            head_dim,
            ..
        } = self.shape;
        let first = (block as usize * kv_heads + self.head) * block_tokens;
        let slice = |data: *mut u32, width: usize| {
            // SAFETY: `write` checked the block; the layer's words hold `blocks * kv_heads * block_tokens * width` elements, of which
            // these are this head's alone.
            unsafe {
                std::slice::from_raw_parts_mut(
                    data.cast::<E>().add(first * width),
                    block_tokens * width,
                )
            }
        };
        (
            slice(self.keys, head_dim),
            slice(self.values, padded(head_dim)),
        )
    }
}

/// Puts a key into its slot of `[tile][head_dim][16]`.
fn scatter<E>(keys: &mut [E], slot: usize, key: impl ExactSizeIterator<Item = E>) {
    let first = slot / TILE_POSITIONS * TILE_POSITIONS * key.len() + slot % TILE_POSITIONS;
    for (place, x) in keys[first..].iter_mut().step_by(TILE_POSITIONS).zip(key) {
        *place = x;
    }
}

impl Shape {
    fn view(self, words: &[u32]) -> KvSlice<'_> {
        match self.dtype {
            ComputeType::F32 => KvSlice::F32(bytemuck::cast_slice(words)),
            ComputeType::Bf16 => KvSlice::Bf16(bytemuck::cast_slice(words)),
        }
    }
}

/// u32 of one layer's keys and of its values.
fn words(
    spec: &ModelSpec,
    dtype: ComputeType,
    blocks: usize,
    block_tokens: usize,
) -> Option<[usize; 2]> {
    let positions = blocks
        .checked_mul(block_tokens)?
        .checked_mul(spec.kv_heads)?;
    let words = |width: usize| {
        Some(
            positions
                .checked_mul(width)?
                .checked_mul(dtype.bytes())?
                .div_ceil(4),
        )
    };
    Some([words(spec.head_dim)?, words(padded(spec.head_dim))?])
}
