//! The paged cache of keys and values of an attention worker.
//!
//! Per layer, `[block][kv_head]` and then, for keys `[tile of 16 positions][head_dim][16]`, for values
//! `[position][head_dim padded to 16]` (see `kernels/attention.rs` for why). Which sequence owns a block is the scheduler's business.

use crate::ModelSpec;
use crate::dtype::ComputeType;
use crate::kernels::{Arena, ArenaBlock, Isa, KvSlice, TILE_POSITIONS, padded, round_to_bf16};

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
    ) -> Self {
        let bytes = Self::bytes(spec, dtype, blocks, block_tokens).expect("sizes were checked");
        let shape = Shape {
            isa,
            dtype,
            block_tokens,
            kv_heads: spec.kv_heads,
            head_dim: spec.head_dim,
        };
        let mut arena = Arena::new(bytes);
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

    /// Stores one position's keys and values, `[kv_heads * head_dim]` each.
    pub(crate) fn write(
        &mut self,
        layer: usize,
        block: u32,
        slot: usize,
        key: &[f32],
        value: &[f32],
    ) {
        let Shape {
            isa,
            dtype,
            block_tokens,
            kv_heads,
            head_dim,
            ..
        } = self.shape;
        let LayerCache { keys, values } = &mut self.layers[layer];
        let width = padded(head_dim);
        for (head, (key, value)) in key
            .chunks_exact(head_dim)
            .zip(value.chunks_exact(head_dim))
            .enumerate()
        {
            let first = (block as usize * kv_heads + head) * block_tokens;
            let key_at =
                (first + slot / TILE_POSITIONS * TILE_POSITIONS) * head_dim + slot % TILE_POSITIONS;
            let value_at = (first + slot) * width;
            match dtype {
                ComputeType::F32 => {
                    let keys: &mut [f32] = bytemuck::cast_slice_mut(keys);
                    for (place, x) in keys[key_at..].iter_mut().step_by(TILE_POSITIONS).zip(key) {
                        *place = *x;
                    }
                    let values: &mut [f32] = bytemuck::cast_slice_mut(values);
                    values[value_at..][..head_dim].copy_from_slice(value);
                }
                ComputeType::Bf16 => {
                    let keys: &mut [u16] = bytemuck::cast_slice_mut(keys);
                    for (place, x) in keys[key_at..].iter_mut().step_by(TILE_POSITIONS).zip(key) {
                        *place = half::bf16::from_f32(*x).to_bits();
                    }
                    let values: &mut [u16] = bytemuck::cast_slice_mut(values);
                    round_to_bf16(isa, value, &mut values[value_at..][..head_dim]);
                }
            }
        }
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
