//! The in-process fabric: how long a frame takes there and back, and how many bytes move, by size and by M x N.
//!
//! Frames are posted, not filled: the cost of producing bytes is the kernels'. The consumer reads one byte a page, so
//! that a fabric that copied would show. Numbers depend on the cores: with fewer cores than workers a round trip is
//! two thread wake-ups.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use volley_transports::{Endpoint, Event, InProcess, InProcessFabric, Lane, MicroBatch, Topology};

const SIZES: [usize; 5] = [256, 4 << 10, 64 << 10, 512 << 10, 4 << 20];
const GRIDS: [(u16, u16); 4] = [(1, 1), (2, 2), (2, 4), (4, 4)];
const PAGE: usize = 4096;

/// One lane, one frame under way: latency.
fn round_trip(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("round_trip");
    for bytes in SIZES {
        group.throughput(Throughput::Bytes(2 * bytes as u64));
        group.bench_function(BenchmarkId::from_parameter(bytes), |bencher| {
            bencher.iter_custom(|rounds| rally(1, 1, 1, bytes, rounds));
        });
    }
    group.finish();
}

/// Two micro-batches on every lane of the grid: throughput of the whole fabric.
fn many_to_many(criterion: &mut Criterion) {
    const BYTES: usize = 64 << 10;
    let mut group = criterion.benchmark_group("many_to_many_64KiB");
    for (attention, experts) in GRIDS {
        let lanes = u64::from(attention) * u64::from(experts) * 2;
        group.throughput(Throughput::Bytes(2 * lanes * BYTES as u64));
        group.bench_function(
            BenchmarkId::from_parameter(format!("{attention}x{experts}")),
            |bencher| {
                bencher.iter_custom(|rounds| rally(attention, experts, 2, BYTES, rounds));
            },
        );
    }
    group.finish();
}

/// Plays `rounds` round trips on every lane; returns the time from the first post to the last answer.
fn rally(attention: u16, experts: u16, micro_batches: u8, bytes: usize, rounds: u64) -> Duration {
    let topology = Topology {
        attention,
        experts,
        micro_batches,
        dispatch_bytes: bytes,
        combine_bytes: bytes,
    };
    let mut calling = InProcessFabric::build(topology).expect("a small topology");
    let answering = calling.split_off(attention.into());
    std::thread::scope(|scope| {
        for end in answering {
            scope.spawn(move || answer(end, bytes));
        }
        let started = Instant::now();
        let threads = calling
            .into_iter()
            .map(|end| scope.spawn(move || call(end, bytes, rounds)));
        // All are spawned before the first is joined, and all ends stay open until the clock is read.
        let threads = threads.collect::<Vec<_>>();
        let ends = threads
            .into_iter()
            .map(|thread| thread.join().expect("a caller"))
            .collect::<Vec<_>>();
        let elapsed = started.elapsed();
        drop(ends);
        elapsed
    })
}

fn call(mut end: InProcess, bytes: usize, rounds: u64) -> InProcess {
    let lanes = usize::from(end.peers()) * usize::from(end.micro_batches());
    for peer in 0..end.peers() {
        for micro_batch in 0..end.micro_batches() {
            end.post(Lane::new(peer, MicroBatch(micro_batch)), bytes)
                .expect("a fresh lane");
        }
    }
    let mut left = vec![rounds; lanes];
    let mut open = lanes;
    while open > 0 {
        let Some(Event::Arrived { lane, .. }) = end.poll() else {
            end.wait(Duration::from_secs(1));
            continue;
        };
        read(&end, lane);
        let left = &mut left[usize::from(lane.peer) * usize::from(end.micro_batches())
            + usize::from(lane.micro_batch.0)];
        *left -= 1;
        if *left == 0 {
            open -= 1;
        } else {
            end.post(lane, bytes).expect("a lane that came back");
        }
    }
    end
}

fn answer(mut end: InProcess, bytes: usize) {
    let mut peers = end.peers();
    while peers > 0 {
        match end.poll() {
            Some(Event::Arrived { lane, .. }) => {
                read(&end, lane);
                end.post(lane, bytes).expect("a lane that arrived");
            }
            Some(Event::Lost { .. }) => peers -= 1,
            None => end.wait(Duration::from_secs(1)),
        }
    }
}

fn read(end: &InProcess, lane: Lane) {
    let frame = end.received(lane).expect("a lane that arrived");
    let sum = frame
        .iter()
        .step_by(PAGE)
        .map(|&byte| u64::from(byte))
        .sum::<u64>();
    std::hint::black_box(sum);
}

fn short() -> Criterion {
    Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(15)
}

criterion_group! { name = benches; config = short(); targets = round_trip, many_to_many }
criterion_main!(benches);
