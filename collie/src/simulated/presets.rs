//! Subsystems F and H of the paper: a 200 Gb/s and a 100 Gb/s adapter, with the 18 anomalies of its Table 2.
//!
//! The conditions are the table's necessary ones. Queue pairs of bidirectional traffic are counted there in both directions together; a point counts those of one.
//! "Depth" means the receive queue where the cause lies in receive work requests (#1, #2, #5, #6, #15, #17), and the send queue elsewhere. A message bound speaks of every message of the
//! sequence.

use super::mechanism::{Effect, Mechanism};
use super::{Model, Noise};
use crate::region::{Condition, Region};
use crate::space::{Axis, Category, Choice, Direction, Memory, Operation, Quantity, Space};

const KIB: f64 = 1024.0;

/// The counters of both, by their place in the lists below.
const COUNTERS: [&str; 9] = [
    "receive_wqe_cache_miss",
    "icm_cache_miss",
    "pcie_ordering_stall",
    "packet_processor_stall",
    "host_path_backpressure",
    "loopback_buffer_occupancy",
    "read_response_stall",
    "doorbell_queue_wait",
    "internal_bus_backpressure",
];
const WQE: usize = 0;
const ICM: usize = 1;
const ORDER: usize = 2;
const PROCESSOR: usize = 3;
const HOST: usize = 4;
const LOOPBACK: usize = 5;
const READ: usize = 6;
const DOORBELL: usize = 7;
const BUS: usize = 8;

fn operation(values: &[Operation]) -> Condition {
    Condition::Among {
        category: Category::Operation,
        values: values.iter().copied().map(Choice::Operation).collect(),
    }
}

fn reliable() -> Condition {
    operation(&[Operation::RcSend, Operation::RcWrite, Operation::RcRead])
}

fn direction(value: Direction) -> Condition {
    Condition::Among {
        category: Category::Direction,
        values: vec![Choice::Direction(value)],
    }
}

fn mtu(bytes: u32) -> Condition {
    Condition::Among {
        category: Category::Mtu,
        values: vec![Choice::Mtu(bytes)],
    }
}

fn memory_a(value: Memory) -> Condition {
    Condition::Among {
        category: Category::MemoryA,
        values: vec![Choice::Memory(value)],
    }
}

fn at_least(axis: Axis, low: f64) -> Condition {
    Condition::Within {
        quantity: Quantity::Axis(axis),
        at_least: Some(low),
        at_most: None,
    }
}

fn at_most(axis: Axis, high: f64) -> Condition {
    Condition::Within {
        quantity: Quantity::Axis(axis),
        at_least: None,
        at_most: Some(high),
    }
}

fn mechanism(
    name: &str,
    conditions: Vec<Condition>,
    pause: f64,
    throughput: f64,
    drives: &[(usize, f64)],
) -> Mechanism {
    Mechanism {
        name: name.to_owned(),
        region: Region { conditions },
        effect: Effect { pause, throughput },
        sags: true,
        drives: drives.to_vec(),
    }
}

fn space() -> Space {
    Space {
        operation: Operation::PUBLISHED.to_vec(),
        axes: Space::published_axes(4096),
        ..Space::default()
    }
}

fn model(
    name: &str,
    line_bits_per_s: f64,
    packets_per_s: f64,
    mechanisms: Vec<Mechanism>,
) -> Model {
    Model {
        name: name.to_owned(),
        space: space(),
        line_bits_per_s,
        packets_per_s,
        doorbells_per_s: 2e6,
        counters: COUNTERS.iter().map(|name| (*name).to_owned()).collect(),
        idle: vec![2e4, 1e4, 5e3, 3e3, 4e3, 1e3, 2e3, 6e3, 8e3],
        mechanisms,
        noise: Noise::default(),
    }
}

/// Subsystem F: Mellanox CX-6, 200 Gb/s, 13 anomalies.
pub(super) fn f() -> Model {
    use Axis::{Batch, LargestBytes, Qps, ReceiveDepth, SendDepth, Sges, SmallestBytes};
    use Direction::{Bidirectional, Loopback};
    let cliff = |mut mechanism: Mechanism| {
        mechanism.sags = false;
        mechanism
    };
    let mixed = [
        at_most(SmallestBytes, KIB),
        at_least(LargestBytes, 64.0 * KIB),
    ];
    let both_ways =
        |conditions: &[Condition]| [&[direction(Bidirectional)], conditions, &mixed].concat();
    let regions_total = Condition::Within {
        quantity: Quantity::Product(Qps, Axis::Regions),
        at_least: Some(12_000.0),
        at_most: None,
    };
    let list = vec![
        mechanism(
            "#1",
            vec![
                operation(&[Operation::UdSend]),
                at_least(Batch, 64.0),
                at_least(ReceiveDepth, 256.0),
            ],
            0.20,
            0.85,
            &[(WQE, 20.0), (BUS, 1.0)],
        ),
        mechanism(
            "#2",
            vec![
                operation(&[Operation::UdSend]),
                at_most(Batch, 8.0),
                at_least(ReceiveDepth, 1024.0),
                at_most(LargestBytes, KIB),
                at_least(Qps, 16.0),
            ],
            0.0,
            0.70,
            &[(WQE, 15.0), (DOORBELL, 4.0)],
        ),
        mechanism(
            "#3",
            vec![
                operation(&[Operation::RcRead]),
                mtu(1024),
                at_least(SmallestBytes, 16.0 * KIB),
            ],
            0.10,
            0.45,
            &[(READ, 15.0), (BUS, 2.0)],
        ),
        mechanism(
            "#4",
            vec![
                operation(&[Operation::RcRead]),
                direction(Bidirectional),
                at_least(Batch, 32.0),
                at_least(Sges, 4.0),
                at_least(Qps, 80.0),
            ],
            0.30,
            0.80,
            &[(WQE, 6.0), (READ, 20.0)],
        ),
        mechanism(
            "#5",
            vec![
                operation(&[Operation::RcSend]),
                mtu(1024),
                at_least(Batch, 64.0),
                at_least(ReceiveDepth, 1024.0),
                at_least(SmallestBytes, 2.0 * KIB),
                at_most(LargestBytes, 8.0 * KIB),
            ],
            0.15,
            0.40,
            &[(WQE, 25.0)],
        ),
        mechanism(
            "#6",
            vec![
                operation(&[Operation::RcSend]),
                mtu(1024),
                at_most(Batch, 16.0),
                at_least(Sges, 2.0),
                at_least(ReceiveDepth, 1024.0),
                at_most(LargestBytes, KIB),
                at_least(Qps, 32.0),
            ],
            0.0,
            0.65,
            &[(WQE, 20.0), (DOORBELL, 3.0)],
        ),
        cliff(mechanism(
            "#7",
            vec![
                operation(&[Operation::RcWrite]),
                at_most(Batch, 1.0),
                at_most(LargestBytes, KIB),
                regions_total,
            ],
            0.0,
            0.60,
            &[(ICM, 25.0)],
        )),
        cliff(mechanism(
            "#8",
            vec![
                operation(&[Operation::RcWrite]),
                at_most(Batch, 1.0),
                at_most(SendDepth, 16.0),
                at_most(LargestBytes, KIB),
                at_least(Qps, 480.0),
            ],
            0.0,
            0.55,
            &[(ICM, 20.0), (DOORBELL, 5.0)],
        )),
        mechanism(
            "#9",
            both_ways(&[at_least(Sges, 3.0)]),
            0.25,
            0.30,
            &[(ORDER, 20.0), (HOST, 2.0)],
        ),
        mechanism(
            "#10",
            both_ways(&[
                operation(&[Operation::RcWrite]),
                at_least(Batch, 64.0),
                at_least(Qps, 160.0),
            ]),
            0.12,
            0.85,
            &[(PROCESSOR, 20.0), (ORDER, 3.0)],
        ),
        mechanism(
            "#11",
            vec![direction(Bidirectional), memory_a(Memory::Dram(1))],
            0.157,
            0.75,
            &[(HOST, 10.0)],
        ),
        mechanism(
            "#12",
            vec![memory_a(Memory::Gpu(0))],
            0.15,
            0.18,
            &[(HOST, 15.0), (ORDER, 4.0)],
        ),
        mechanism(
            "#13",
            vec![direction(Loopback)],
            0.10,
            0.60,
            &[(LOOPBACK, 20.0)],
        ),
    ];
    model("F", 200e9, 200e6, list)
}

/// Subsystem H: Broadcom P2100G, 100 Gb/s, 5 anomalies.
pub(super) fn h() -> Model {
    use Axis::{Batch, LargestBytes, Qps, ReceiveDepth, Sges};
    use Direction::Bidirectional;
    let list = vec![
        mechanism(
            "#14",
            vec![
                reliable(),
                direction(Bidirectional),
                mtu(4096),
                at_least(Sges, 4.0),
                at_least(Qps, 650.0),
            ],
            0.0,
            0.60,
            &[(ICM, 20.0)],
        ),
        mechanism(
            "#15",
            vec![
                operation(&[Operation::UdSend]),
                at_least(ReceiveDepth, 64.0),
                at_least(Qps, 32.0),
            ],
            0.10,
            0.90,
            &[(WQE, 15.0)],
        ),
        mechanism(
            "#16",
            vec![
                operation(&[Operation::RcRead]),
                mtu(1024),
                at_least(Batch, 8.0),
                at_least(Qps, 500.0),
            ],
            0.15,
            0.85,
            &[(READ, 20.0)],
        ),
        mechanism(
            "#17",
            vec![
                operation(&[Operation::RcSend]),
                at_most(Batch, 16.0),
                at_least(ReceiveDepth, 128.0),
                at_most(LargestBytes, KIB),
                at_least(Qps, 64.0),
            ],
            0.08,
            0.90,
            &[(WQE, 20.0), (DOORBELL, 3.0)],
        ),
        mechanism(
            "#18",
            vec![
                reliable(),
                direction(Bidirectional),
                mtu(1024),
                at_least(Batch, 32.0),
                at_most(LargestBytes, 64.0 * KIB),
                at_least(Qps, 15.0),
            ],
            0.12,
            0.85,
            &[(PROCESSOR, 20.0), (BUS, 3.0)],
        ),
    ];
    model("H", 100e9, 100e6, list)
}
