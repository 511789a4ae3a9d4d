//! Steady decoding allocates nothing on the threads that compute, but for the report that an attention worker sends after each step.
//!
//! An allocator of this test's own counts by the name of the thread: expert workers and helpers must count none, whatever is decoded; an attention worker
//! a few for a step, as many for one sequence as for forty and for one layer as for three.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)] // a global allocator

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use common::{config, join_all, model, start};
use volley_actors::{ClusterConfig, Request, RequestEvent};
use volley_models::{ComputeType, Quantization};

/// Allocations while [`COUNTING`], by who made them.
static ATTENTION: AtomicUsize = AtomicUsize::new(0);
static OTHERS: AtomicUsize = AtomicUsize::new(0);
static COUNTING: AtomicBool = AtomicBool::new(false);

struct Counting;

impl Counting {
    fn count(&self) {
        if !COUNTING.load(Ordering::Relaxed) {
            return;
        }
        let mut name = [0u8; 16];
        // SAFETY: the system writes at most sixteen bytes of name.
        unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
        if name.starts_with(b"attention-") {
            ATTENTION.fetch_add(1, Ordering::Relaxed);
        } else if name.starts_with(b"expert-") || name.starts_with(b"helper ") {
            OTHERS.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        self.count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(block, layout, size) }
    }
    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Tokens before and after those that are counted, of each sequence.
const MARGIN: usize = 12;
/// Tokens of each sequence that are counted.
const COUNTED: usize = 60;
/// Allocations of one report: its results, and its place in the mailbox.
const REPORT: usize = 4;

#[tokio::test]
async fn a_step_allocates_its_report_and_nothing_else() {
    for (name, dtype, quantize) in [
        ("tiny-mixtral", ComputeType::F32, None),
        ("tiny-qwen3moe", ComputeType::Bf16, None),
        ("tiny-qwen3moe", ComputeType::Bf16, Some(Quantization::Q8)),
    ] {
        for (shape, sequences) in [((1, 1, 1), 1), ((1, 2, 1), 40), ((1, 2, 2), 40)] {
            let model = model(name);
            let config = ClusterConfig {
                quantize,
                kv_blocks: 400,
                ..config(shape, dtype)
            };
            let cluster = start(&model, config, None);
            let begun = AtomicUsize::new(0);
            let tokens = MARGIN + COUNTED + MARGIN;
            let streams = (0..sequences).map(|i| {
                let (cluster, begun) = (&cluster, &begun);
                async move {
                    let prompt = (0..4 + i).map(|t| (t * 7 + i) % 100).collect();
                    let request = Request {
                        stop_tokens: vec![],
                        ..Request::greedy(prompt, tokens as u32)
                    };
                    let stream = cluster.client().submit(request).await;
                    let mut stream = stream.expect("the request is taken");
                    let mut count = 0;
                    while let Some(event) = stream.next().await {
                        let RequestEvent::Token { .. } = event else {
                            continue;
                        };
                        count += 1;
                        // Counted from when the last sequence is well under way until the first nears its end.
                        if count == MARGIN
                            && begun.fetch_add(1, Ordering::Relaxed) + 1 == sequences as usize
                        {
                            COUNTING.store(true, Ordering::Relaxed);
                        }
                        if count == MARGIN + COUNTED {
                            COUNTING.store(false, Ordering::Relaxed);
                        }
                    }
                    assert_eq!(count, tokens);
                }
            });
            join_all(streams).await;
            cluster.shutdown(Duration::from_secs(5));
            let others = OTHERS.swap(0, Ordering::Relaxed);
            let attention = ATTENTION.swap(0, Ordering::Relaxed);
            let what = format!("{name} {quantize:?} {shape:?}, {sequences} sequences");
            assert_eq!(others, 0, "{what}: expert workers or helpers");
            assert!(attention > 0, "{what}: nothing was counted");
            // Steps of micro-batches: at most those of the tokens that were counted, and some that were under way.
            let steps = (COUNTED + 4) * usize::from(shape.2);
            assert!(
                attention <= steps * REPORT,
                "{what}: {attention} allocations in {steps} steps"
            );
        }
    }
}
