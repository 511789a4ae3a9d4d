//! No kernel reads or writes a byte beyond what it was given, on any instruction set.
//!
//! What a kernel gets lies, in these tests, between pages that no one may touch, at the very end or at the very beginning of what is between them, so a step too far
//! ends the test. Packed weights and caches need no test of their own for that: in test builds every [`Arena`](super::Arena) ends at such a page.
//! Unlike a sanitizer or valgrind it sees every instruction set of the machine, at full speed. Prefetches may go anywhere: they do not touch.

use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use proptest::prelude::*;

use super::attention::padded;
use super::*;
use crate::crew::Member;
use crate::spec::{Rope, RopeScaling};
use crate::testing::{Random, matrix};
use crate::weights::ElementType;

/// A slice between two pages that may not be touched.
pub(super) struct Guarded<T> {
    map: *mut libc::c_void,
    map_bytes: usize,
    first: NonNull<T>,
    len: usize,
}

/// Which of the two pages a guarded slice touches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Edge {
    Begin,
    End,
}

impl<T: Copy> Guarded<T> {
    pub(super) fn new(edge: Edge, values: &[T]) -> Self {
        // SAFETY: a question.
        let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as usize;
        let bytes = size_of_val(values);
        let middle = bytes.next_multiple_of(page).max(page);
        let map_bytes = middle + 2 * page;
        // SAFETY: new pages; the first and the last lose their rights, the values are copied into the others.
        unsafe {
            let map = libc::mmap(
                std::ptr::null_mut(),
                map_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            );
            assert_ne!(map, libc::MAP_FAILED, "memory for {map_bytes} bytes");
            assert_eq!(libc::mprotect(map, page, libc::PROT_NONE), 0);
            let last = map.byte_add(map_bytes - page);
            assert_eq!(libc::mprotect(last, page, libc::PROT_NONE), 0);
            let first = match edge {
                Edge::Begin => map.byte_add(page),
                Edge::End => last.byte_sub(bytes),
            };
            let first: NonNull<T> = NonNull::new(first.cast()).expect("no mapping is at zero");
            first
                .as_ptr()
                .copy_from_nonoverlapping(values.as_ptr(), values.len());
            Guarded {
                map,
                map_bytes,
                first,
                len: values.len(),
            }
        }
    }
}

impl<T> Deref for Guarded<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `new` wrote that many.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.len) }
    }
}

impl<T> DerefMut for Guarded<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), self.len) }
    }
}

impl<T> Drop for Guarded<T> {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's.
        unsafe { libc::munmap(self.map, self.map_bytes) };
    }
}

fn edges() -> impl Strategy<Value = Edge> {
    prop::sample::select(vec![Edge::Begin, Edge::End])
}

/// Random values in `[-1, 1)` at an edge.
fn values(edge: Edge, len: usize, seed: u64) -> Guarded<f32> {
    Guarded::new(edge, &Random::new(seed).values(len, 1.0))
}

#[test]
#[cfg(target_os = "linux")]
fn a_step_too_far_is_fatal() {
    // In a child, which dies of it: otherwise this file would prove nothing.
    for (edge, step) in [(Edge::Begin, -1), (Edge::End, 7)] {
        let guarded = Guarded::new(edge, &[0u8; 7]);
        // SAFETY: the child touches one byte and ends, without a lock, an allocation or a destructor of the parent's.
        unsafe {
            let child = libc::fork();
            assert!(child >= 0, "no process");
            if child == 0 {
                libc::signal(libc::SIGSEGV, libc::SIG_DFL);
                libc::signal(libc::SIGBUS, libc::SIG_DFL);
                guarded.first.as_ptr().offset(step).read_volatile();
                libc::_exit(0);
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &mut status, 0), child);
            assert!(libc::WIFSIGNALED(status), "{edge:?} was passed unseen");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn products(
        (m, n, k) in (0usize..31, 1usize..100, 0usize..200),
        kind in prop::sample::select(WeightType::ALL.to_vec()),
        gap in 0usize..40,
        from_bits: bool,
        start in 0usize..3,
        (edge, seed) in (edges(), any::<u64>()),
    ) {
        let mut random = Random::new(seed);
        let view = matrix(&mut random, n, k, 1.0, ElementType::F32, false);
        let mut crew = Member::alone();
        let mut arena = Arena::new(PackedMatrix::bytes(kind, n, k).unwrap(), &mut crew);
        let w = PackedMatrix::pack(&mut arena, kind, std::slice::from_ref(&view));
        let x = values(edge, m * k, seed);
        let mut bits = Guarded::new(edge, &vec![0u16; m * k]);
        let bias = values(edge, n, seed ^ 1);
        let stride = n + gap;
        let size = m.saturating_sub(1) * stride + if m == 0 { 0 } else { n };
        for isa in Isa::available() {
            round_to_bf16(isa, &x, &mut bits);
            let x = if from_bits { Rows::Bf16(&bits) } else { Rows::F32(&x) };
            let mut rows = PackedRows::new(isa, m, k);
            rows.pack(kind, x, m, k);
            let words = Guarded::new(edge, rows.words());
            let mut out = values(edge, size, seed ^ 2);
            let mut again = out.to_vec();
            let start = [Start::Zero, Start::Bias(&bias), Start::Present][start];
            let group = PackedGroup::from(&rows);
            gemm(group, &w, 0..w.panels(), MatrixMut::new(&mut again, m, n, stride), start);
            // What stands between the rows is another's.
            let between = |out: &[f32]| -> Vec<f32> {
                out.chunks(stride).flat_map(|row| row.iter().skip(n).copied()).collect()
            };
            let untouched = between(&out);
            gemm(group.with_words(&words), &w, 0..w.panels(), MatrixMut::new(&mut out, m, n, stride), start);
            prop_assert_eq!(&untouched, &between(&out), "{:?}", isa);
            prop_assert_eq!(&out[..], &again[..], "{:?}", isa);
        }
    }

    #[test]
    fn attention(
        (kv_heads, group, half) in (1usize..3, 1usize..6, 1usize..36),
        (rows, before) in (1usize..20, 0usize..90),
        window in prop::option::of(1usize..60),
        bf16: bool,
        (edge, seed) in (edges(), any::<u64>()),
    ) {
        let (heads, dim, block_tokens) = (kv_heads * group, 2 * half, 16);
        let blocks: Vec<u32> = (0..(before + rows).div_ceil(block_tokens) as u32).rev().collect();
        let positions = blocks.len() * block_tokens * kv_heads;
        let (keys, cached) = (values(edge, positions * dim, seed), values(edge, positions * padded(dim), seed ^ 1));
        let bits = |x: &[f32]| {
            let bits: Vec<u16> = x.iter().map(|x| bf16_bits(*x)).collect();
            Guarded::new(edge, &bits)
        };
        let (key_bits, value_bits) = (bits(&keys), bits(&cached));
        let queries = values(edge, rows * heads * dim, seed ^ 2);
        let blocks = Guarded::new(edge, &blocks);
        let paged = PagedAttention {
            queries: &queries,
            query_stride: heads * dim,
            keys: if bf16 { KvSlice::Bf16(&key_bits) } else { KvSlice::F32(&keys) },
            values: if bf16 { KvSlice::Bf16(&value_bits) } else { KvSlice::F32(&cached) },
            block_tokens,
            heads,
            kv_heads,
            head_dim: dim,
            window,
            scale: 0.3,
        };
        for isa in Isa::available() {
            let mut scratch = AttentionScratch::new(rows, group, dim);
            let mut out = values(edge, rows * heads * dim, seed);
            let span = Span { first_row: 0, rows, start: before, blocks: &blocks };
            let place = MatrixMut::new(&mut out, rows, heads * dim, heads * dim);
            paged.run(isa, span, 0..kv_heads, &mut scratch, place);
            prop_assert!(out.iter().all(|x| x.abs() <= 1.01), "{isa:?}");
        }
    }

    #[test]
    fn norms_and_rotations(
        (rows, width, half) in (0usize..5, 1usize..70, 1usize..40),
        (edge, seed) in (edges(), any::<u64>()),
    ) {
        let (x, weight) = (values(edge, rows * width, seed), values(edge, width, seed ^ 1));
        let rope = Rope { theta: 1e4, scaling: RopeScaling::None };
        let table = RopeTable::new(&rope, 2 * half, 9);
        let positions = Guarded::new(edge, &(0..rows as u32).map(|row| row * 2).collect::<Vec<_>>());
        let head_norm = values(edge, 2 * half, seed ^ 2);
        for isa in Isa::available() {
            let mut out = values(edge, rows * width, seed ^ 3);
            rms_norm(isa, &x, &weight, 1e-5, &mut out);
            layer_norm(isa, &x, &weight, 1e-5, &mut out);
            let mut heads = values(edge, rows * 2 * half, seed);
            let place = MatrixMut::new(&mut heads, rows, 2 * half, 2 * half);
            table.turn_heads(isa, place, &positions, Some((&head_norm, 1e-5)));
            prop_assert!(out.iter().chain(heads.iter()).all(|x| x.is_finite()), "{isa:?}");
        }
    }

    #[test]
    fn gates_and_activations(
        (rows, experts) in (0usize..5, 1usize..70),
        (edge, seed) in (edges(), any::<u64>()),
    ) {
        for isa in Isa::available() {
            let mut p = values(edge, rows * experts, seed);
            softmax(isa, &mut p, experts);
            let k = experts.min(3);
            let mut ids = Guarded::new(edge, &vec![0u16; rows * k]);
            let mut weights = values(edge, rows * k, seed);
            top_k(TopK { experts, k, normalize: true }, &mut p, &mut ids, &mut weights);
            prop_assert!(ids.iter().all(|id| usize::from(*id) < experts), "{isa:?}");

            let (mut gate, mut up) = (values(edge, rows * experts, seed), values(edge, rows * experts, seed ^ 1));
            let (gates, ups) = (
                MatrixMut::new(&mut gate, rows, experts, experts),
                MatrixMut::new(&mut up, rows, experts, experts),
            );
            gated_silu(isa, gates, ups);
            prop_assert!(gate.iter().all(|x| x.abs() <= 1.0), "{isa:?}");
            add_assign(&mut gate, &up);
            clamp(&mut gate, 0.5);
            let mut bits = Guarded::new(edge, &vec![0u16; gate.len()]);
            round_to_bf16(isa, &gate, &mut bits);
            widen_bf16(&bits, &mut up);
            prop_assert!(up.iter().all(|x| x.abs() <= 0.5), "{isa:?}");
        }
    }
}
