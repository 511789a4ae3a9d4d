//! The hot operations, written once over sixteen lanes and compiled for every instruction set.
//!
//! [`Isa`] is chosen once, at start-up, and holding one proves that the processor has it. A kernel is a struct that
//! implements `simd::Kernel`: its `run` is generic over `simd::Simd`, and `Isa::run` enters it
//! through a function compiled for that instruction set. So there is one text of each operation, and the
//! files `portable.rs`, `avx2.rs`, `avx512.rs` and `neon.rs` hold nothing but lanes.
//!
//! # What a kernel promises
//! * A row of a result depends on nothing but its own inputs: not on the rows beside it, the height of the tile
//!   it was computed in, the panels a call was asked for, or the place of a value in its vector.
//! * Every sum has one order. A product's sum over `k` is one chain in ascending `k`; a reduction over a vector adds
//!   lane `i` of every sixteen, then halves: 8, 4, 2, 1.
//! * [`InstructionSet::Avx2Fma`], [`InstructionSet::Avx512`], [`InstructionSet::Avx512Vnni`], [`InstructionSet::Neon`] and
//!   [`InstructionSet::NeonDot`] compute the same sums. `Portable` rounds every product (it has no fused multiply-add), and
//!   `Avx512Bf16` and `NeonBf16` sum products of bf16 in pairs, each in its own way; these three differ from the others in the last
//!   bits. A cluster that wants equal answers runs one of them everywhere.
//! * Products of quantised weights are sums of integers, exact everywhere, and one multiplication in f32 for every group
//!   (`quantize.rs`): there all agree but `Portable`.

#![allow(unsafe_code)]

mod activation;
mod arena;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(all(test, unix))]
mod bounds;
mod convert;
mod gate;
mod gemm;
#[cfg(target_arch = "aarch64")]
mod neon;
mod norm;
mod pack;
mod portable;
mod product;
mod quantize;
mod rope;
mod rows;
mod simd;

pub use activation::gated_silu;
pub use arena::{Arena, ArenaBlock};
pub(crate) use attention::padded;
pub use attention::{AttentionScratch, KvSlice, PagedAttention, Span, TILE_POSITIONS};
pub use convert::{add_assign, clamp, round_to_bf16, widen_bf16};
pub use gate::{TopK, softmax, top_k};
pub(crate) use gemm::columns_per_piece;
pub use gemm::{MatrixMut, Start, gemm};
pub use norm::{layer_norm, rms_norm};
pub use pack::{PANEL_COLUMNS, PackedMatrix, WeightType};
pub use rope::RopeTable;
pub use rows::{PackedGroup, PackedRows, Rows};
pub(crate) use simd::bf16_bits;

#[cfg(target_arch = "aarch64")]
use std::arch::is_aarch64_feature_detected;

use simd::Kernel;

/// The instruction sets Volley has kernels for, from the poorest to the richest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum InstructionSet {
    /// Whatever the compiler makes of plain Rust.
    Portable,
    /// AVX2 with fused multiply-add and conversions of f16.
    Avx2Fma,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// AVX-512 with products of bytes.
    Avx512Vnni,
    /// AVX-512 with products of bytes and of bf16.
    Avx512Bf16,
    /// NEON, which every 64-bit ARM processor has.
    Neon,
    /// NEON with products of bytes (`dotprod`).
    NeonDot,
    /// NEON with products of bytes and of bf16 (`dotprod`, `i8mm` and `bf16`).
    NeonBf16,
}

impl InstructionSet {
    /// All of them, those of one architecture from the poorest to the richest.
    pub const ALL: [InstructionSet; 8] = [
        InstructionSet::Portable,
        InstructionSet::Avx2Fma,
        InstructionSet::Avx512,
        InstructionSet::Avx512Vnni,
        InstructionSet::Avx512Bf16,
        InstructionSet::Neon,
        InstructionSet::NeonDot,
        InstructionSet::NeonBf16,
    ];

    /// The name that configuration and logs use.
    pub fn name(self) -> &'static str {
        match self {
            InstructionSet::Portable => "portable",
            InstructionSet::Avx2Fma => "avx2-fma",
            InstructionSet::Avx512 => "avx512",
            InstructionSet::Avx512Vnni => "avx512-vnni",
            InstructionSet::Avx512Bf16 => "avx512-bf16",
            InstructionSet::Neon => "neon",
            InstructionSet::NeonDot => "neon-dot",
            InstructionSet::NeonBf16 => "neon-bf16",
        }
    }

    fn present(self) -> bool {
        match self {
            InstructionSet::Portable => true,
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx2Fma => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512 => {
                InstructionSet::Avx2Fma.present()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
            }
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512Vnni => {
                InstructionSet::Avx512.present() && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "x86_64")]
            InstructionSet::Avx512Bf16 => {
                InstructionSet::Avx512Vnni.present() && is_x86_feature_detected!("avx512bf16")
            }
            #[cfg(target_arch = "aarch64")]
            InstructionSet::Neon => is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            InstructionSet::NeonDot => {
                InstructionSet::Neon.present() && is_aarch64_feature_detected!("dotprod")
            }
            #[cfg(target_arch = "aarch64")]
            InstructionSet::NeonBf16 => {
                InstructionSet::NeonDot.present()
                    && is_aarch64_feature_detected!("i8mm")
                    && is_aarch64_feature_detected!("bf16")
            }
            _ => false,
        }
    }
}

impl std::fmt::Display for InstructionSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// An instruction set was asked for that this processor lacks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this processor has no {wanted}; the best it has is {best}")]
pub struct UnsupportedIsa {
    /// What was asked for.
    pub wanted: InstructionSet,
    /// The richest set that is present.
    pub best: InstructionSet,
}

/// An instruction set that this processor is known to have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Isa(InstructionSet);

impl Isa {
    /// The richest instruction set of this processor.
    pub fn detect() -> Isa {
        let mut best = InstructionSet::Portable;
        for set in InstructionSet::ALL {
            if set.present() {
                best = set;
            }
        }
        Isa(best)
    }

    /// The instruction set asked for.
    ///
    /// # Errors
    /// When this processor lacks it.
    pub fn require(wanted: InstructionSet) -> Result<Isa, UnsupportedIsa> {
        if wanted.present() {
            Ok(Isa(wanted))
        } else {
            Err(UnsupportedIsa {
                wanted,
                best: Isa::detect().0,
            })
        }
    }

    /// Every instruction set of this processor.
    pub fn available() -> impl Iterator<Item = Isa> {
        InstructionSet::ALL
            .into_iter()
            .filter(|set| set.present())
            .map(Isa)
    }

    /// Which one it is.
    pub fn instruction_set(self) -> InstructionSet {
        self.0
    }

    /// Runs `kernel` compiled for this instruction set.
    #[inline]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            InstructionSet::Portable => kernel.run(portable::Portable),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `Isa` exists only after `present` found the features.
            InstructionSet::Avx2Fma => unsafe { avx2::enter(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            InstructionSet::Avx512 => unsafe { avx512::enter(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            InstructionSet::Avx512Vnni => unsafe { avx512::enter_vnni(kernel) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            InstructionSet::Avx512Bf16 => unsafe { avx512::enter_bf16(kernel) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            InstructionSet::Neon => unsafe { neon::enter(kernel) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            InstructionSet::NeonDot => unsafe { neon::enter_dot(kernel) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: as above.
            InstructionSet::NeonBf16 => unsafe { neon::enter_bf16(kernel) },
            _ => unreachable!("no Isa is made of a set that is not present"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detected_set_is_the_last_available_one() {
        assert_eq!(Isa::available().last(), Some(Isa::detect()));
        assert!(Isa::require(InstructionSet::Portable).is_ok());
    }
}
