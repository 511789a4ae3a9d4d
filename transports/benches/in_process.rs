//! The in-process fabric: how long a frame takes there and back, and how many bytes move, by size and by M x N.
//!
//! Frames are posted, not filled: the cost of producing bytes is the kernels'. The consumer reads one byte a page, so
//! that a fabric that copied would show. Numbers depend on the cores: with fewer cores than workers a round trip is
//! two thread wake-ups.

use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use volley_transports::{
    Arrival, Element, Endpoint, Epoch, Event, ExchangeShape, Gather, InProcess, InProcessFabric,
    Lane, Layer, Merge, MicroBatch, Participants, Placement, Rows, RowsMut, Scatter, Step, StepKey,
    Times, Topology,
};

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

/// What the exchange itself costs, on one thread without any computation: 64 rows of 2,048 elements to the top 4 of 16
/// experts on two workers and back. Every row is copied twice out, and its four outputs once into the frame.
fn exchange(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("exchange_64x2048_top4");
    for element in [Element::F32, Element::Bf16] {
        let shape = ExchangeShape {
            attention_workers: 1,
            expert_workers: 2,
            max_rows: 64,
            hidden: 2048,
            top_k: 4,
            element,
        };
        group.bench_function(format!("{element:?}"), |bencher| {
            let mut ends =
                InProcessFabric::build(shape.topology(1).expect("a shape")).expect("a topology");
            let mut experts = ends.split_off(1);
            let attention = &mut ends[0];
            let batch = MicroBatch(0);
            let placement = Placement::even(Epoch(0), 16, 2).expect("a placement");
            let mut scatter = Scatter::new(shape).expect("a shape");
            let mut gather = Gather::new(shape, batch).expect("a shape");
            let mut merges = [0, 1].map(|me| Merge::new(shape, me, batch, 8).expect("a shape"));
            let mut x = vec![0.0; 64 * 4 * 2048];
            let (rows, weights) = (vec![0.5; 64 * 2048], vec![0.25; 64 * 4]);
            let ids = (0..64 * 4)
                .map(|at: u16| (at / 4 * 5 + at % 4 * 3) % 16)
                .collect::<Vec<_>>();
            let mut out = vec![0.0; 64 * 2048];
            let everyone = Participants::all(1);
            let mut step = 0;
            bencher.iter(|| {
                step += 1;
                let key = StepKey {
                    epoch: Epoch(0),
                    step: Step(step),
                    layer: Layer(0),
                    micro_batch: batch,
                };
                scatter
                    .write(
                        attention,
                        &placement,
                        key,
                        &everyone,
                        Rows::F32(&rows),
                        &ids,
                        &weights,
                        &mut gather,
                    )
                    .expect("a dispatch");
                for (end, merge) in experts.iter_mut().zip(&mut merges) {
                    let Some(Event::Arrived { lane, .. }) = end.poll() else {
                        panic!("no dispatch")
                    };
                    assert_eq!(
                        merge.arrived(end, &placement, lane),
                        Ok(Arrival::Ready(key))
                    );
                    merge
                        .groups(end, &mut RowsMut::F32(&mut x))
                        .expect("a batch");
                    merge
                        .respond(end, Rows::F32(&x), Times::default())
                        .expect("answers");
                }
                while let Some(Event::Arrived { lane, .. }) = attention.poll() {
                    gather
                        .add(
                            lane.peer,
                            attention.received(lane).expect("a lane that came back"),
                        )
                        .expect("outputs");
                }
                gather.combine(attention, &mut out).expect("all outputs");
            });
        });
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

criterion_group! { name = benches; config = short(); targets = round_trip, many_to_many, exchange }
criterion_main!(benches);
