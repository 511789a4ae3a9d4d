//! After construction the exchange allocates nothing: every allocation of the thread is counted.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use volley_transports::{
    Arrival, Element, Endpoint, Epoch, Event, ExchangeShape, Gather, InProcessFabric, Layer, Merge,
    MicroBatch, Participants, Placement, Progress, Rows, RowsMut, Scatter, Step, StepKey, Times,
};

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

fn allocations() -> usize {
    ALLOCATIONS.with(Cell::get)
}

// SAFETY: every call goes to the system's allocator unchanged; the counter is a plain cell that never allocates.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|count| count.set(count.get() + 1));
        // SAFETY: the caller's promise on `layout` is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: `ptr` came from `alloc` above with this layout.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn the_counter_counts() {
    let before = allocations();
    drop(std::hint::black_box(vec![1u8; 100]));
    assert_eq!(allocations(), before + 1);
}

#[test]
fn an_exchange_allocates_nothing() {
    let shape = ExchangeShape {
        attention_workers: 2,
        expert_workers: 2,
        max_rows: 8,
        hidden: 64,
        top_k: 2,
        element: Element::Bf16,
    };
    let placement = Placement::even(Epoch(1), 5, 2).unwrap();
    let participants = Participants::all(2);
    let mut attention = InProcessFabric::build(shape.topology(1).unwrap()).unwrap();
    let mut experts = attention.split_off(2);
    let batch = MicroBatch(0);
    let mut scatter = Scatter::new(shape).unwrap();
    let mut gathers = [
        Gather::new(shape, batch).unwrap(),
        Gather::new(shape, batch).unwrap(),
    ];
    let mut merges =
        [0, 1].map(|me| Merge::new(shape, me, batch, placement.max_local_experts(me)).unwrap());
    let mut x = vec![0.0; shape.max_merged().unwrap() as usize * 64];
    let rows = vec![0.5; 8 * 64];
    let ids = [0, 1, 1, 2, 2, 3, 3, 4, 4, 0, 0, 2, 1, 3, 2, 4];
    let weights = [0.5; 16];
    let mut out = vec![0.0; 8 * 64];
    let waker = attention[0].waker();

    let before = allocations();
    for step in 0..50 {
        // Every number of rows, from none to all.
        let n = step as usize % 9;
        let key = StepKey {
            epoch: Epoch(1),
            step: Step(step),
            layer: Layer(0),
            micro_batch: batch,
        };
        for (end, gather) in attention.iter_mut().zip(&mut gathers) {
            let (rows, ids, weights) =
                (Rows::F32(&rows[..n * 64]), &ids[..n * 2], &weights[..n * 2]);
            scatter
                .write(
                    end,
                    &placement,
                    key,
                    &participants,
                    rows,
                    ids,
                    weights,
                    gather,
                )
                .unwrap();
        }
        for (end, merge) in experts.iter_mut().zip(&mut merges) {
            while let Some(Event::Arrived { lane, .. }) = end.poll() {
                if let Arrival::Ready(_) = merge.arrived(end, &placement, lane).unwrap() {
                    merge.groups(end, &mut RowsMut::F32(&mut x)).unwrap();
                    merge.respond(end, Rows::F32(&x), Times::default()).unwrap();
                    assert_eq!(merge.revisit(end, &placement), Ok(None));
                }
            }
        }
        for (end, gather) in attention.iter_mut().zip(&mut gathers) {
            end.wait(Duration::from_secs(1));
            while let Some(Event::Arrived { lane, .. }) = end.poll() {
                gather.add(lane.peer, end.received(lane).unwrap()).unwrap();
            }
            assert_eq!(gather.progress(), Progress::Complete);
            gather.combine(end, &mut out[..n * 64]).unwrap();
            assert!(out[..n * 64].iter().all(|&value| value == 0.5));
            end.wait(Duration::from_micros(1));
            waker.wake();
        }
    }
    assert_eq!(allocations(), before, "the exchange allocated");
}
