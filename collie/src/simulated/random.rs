//! Subsystems drawn from the grammar of conditions: two to six conditions a mechanism, thresholds anywhere, products and ratios among them.
//!
//! They keep the search honest: nothing in it can be fitted to conditions that nobody has seen. A mechanism is drawn again when no workload
//! can meet it, or when others hide it nearly everywhere it fires.

use rand::{Rng, RngExt, SeedableRng};
use rand_pcg::Pcg64;

use super::mechanism::{Effect, Mechanism};
use super::{Model, Noise};
use crate::region::{Condition, Region};
use crate::space::{Axis, Category, Choice, Direction, Memory, Operation, Quantity, Space};

/// Of the points where a mechanism fires, the share where it must be what is seen.
const VISIBLE: f64 = 0.3;

/// The subsystem of a seed.
pub(super) fn model(seed: u64) -> Model {
    // The space must not depend on the seed, or seeds could not be compared.
    let space = Space {
        operation: Operation::PUBLISHED.to_vec(),
        axes: Space::published_axes(4096),
        ..Space::default()
    };
    let mut rng = Pcg64::seed_from_u64(seed ^ 0x5eed_c011_1e00);
    let count = rng.random_range(8..=13);
    let counters = 9;
    let mut model = Model {
        name: format!("random:{seed}"),
        space,
        line_bits_per_s: 200e9,
        packets_per_s: 200e6,
        doorbells_per_s: 2e6,
        counters: (0..counters).map(|i| format!("counter_{i}")).collect(),
        idle: (0..counters)
            .map(|_| 10f64.powf(rng.random_range(3.0..5.0)))
            .collect(),
        mechanisms: Vec::new(),
        noise: Noise::default(),
    };
    while model.mechanisms.len() < count {
        let name = format!("R{}", model.mechanisms.len() + 1);
        let drawn = mechanism(name, &model.space, counters, &mut rng);
        model.mechanisms.push(drawn);
        if (0..model.mechanisms.len()).any(|i| visible(&model, i, &mut rng) < VISIBLE) {
            model.mechanisms.pop();
        }
    }
    model
}

/// Of the points where a mechanism fires, the share where it is the worst; 0 if it cannot fire.
fn visible(model: &Model, index: usize, rng: &mut Pcg64) -> f64 {
    let region = &model.mechanisms[index].region;
    let points: Vec<_> = (0..60)
        .filter_map(|_| region.sample(&model.space, rng))
        .collect();
    if points.len() < 30 {
        return 0.0;
    }
    points
        .iter()
        .filter(|point| model.cause(point) == Some(index))
        .count() as f64
        / points.len() as f64
}

fn mechanism(name: String, space: &Space, counters: usize, rng: &mut Pcg64) -> Mechanism {
    let wanted = rng.random_range(2..=6);
    let mut conditions = Vec::new();
    for category in [
        Category::Operation,
        Category::Direction,
        Category::Mtu,
        Category::MemoryA,
    ] {
        let likely = match category {
            Category::Operation => 0.8,
            Category::Direction => 0.4,
            Category::Mtu => 0.35,
            Category::MemoryA | Category::MemoryB => 0.12,
        };
        if conditions.len() < wanted && rng.random_bool(likely) {
            conditions.push(Condition::Among {
                category,
                values: values(category, rng),
            });
        }
    }
    let mut quantities: Vec<Quantity> = [
        Axis::Qps,
        Axis::Regions,
        Axis::Batch,
        Axis::SendDepth,
        Axis::ReceiveDepth,
        Axis::Sges,
        Axis::SmallestBytes,
        Axis::LargestBytes,
    ]
    .map(Quantity::Axis)
    .to_vec();
    quantities.push(Quantity::Product(Axis::Qps, Axis::Regions));
    quantities.push(Quantity::Ratio(Axis::Batch, Axis::SendDepth));
    while conditions.len() < wanted {
        let quantity = quantities.swap_remove(rng.random_range(0..quantities.len()));
        // One condition on an axis: neither its product nor its ratio beside it.
        quantities.retain(|other| {
            !Axis::ALL
                .iter()
                .any(|&axis| quantity.involves(axis) && other.involves(axis))
        });
        let (low, high) = space.extent(quantity);
        let share = rng.random_range(0.25..0.75);
        let tau = low * (high / low).powf(share);
        let tau = if matches!(quantity, Quantity::Ratio(..)) {
            rng.random_range(0.1..0.5)
        } else {
            tau.round()
        };
        let grows = match quantity {
            Quantity::Axis(Axis::Qps | Axis::Regions | Axis::Sges) => rng.random_bool(0.9),
            Quantity::Axis(_) => rng.random_bool(0.5),
            Quantity::Product(..) | Quantity::Ratio(..) => true,
        };
        conditions.push(if grows {
            Condition::Within {
                quantity,
                at_least: Some(tau),
                at_most: None,
            }
        } else {
            Condition::Within {
                quantity,
                at_least: None,
                at_most: Some(tau),
            }
        });
        if quantities.is_empty() {
            break;
        }
    }
    let pauses = rng.random_bool(0.6);
    let effect = Effect {
        pause: if pauses {
            rng.random_range(0.02..0.3)
        } else {
            0.0
        },
        throughput: if pauses {
            rng.random_range(0.3..0.95)
        } else {
            rng.random_range(0.2..0.72)
        },
    };
    let mut drives = vec![(rng.random_range(0..counters), rng.random_range(10.0..30.0))];
    if rng.random_bool(0.6) {
        let second = rng.random_range(0..counters);
        if second != drives[0].0 {
            drives.push((second, rng.random_range(1.0..6.0)));
        }
    }
    Mechanism {
        name,
        region: Region { conditions },
        effect,
        sags: rng.random_bool(0.8),
        drives,
    }
}

fn values(category: Category, rng: &mut impl Rng) -> Vec<Choice> {
    match category {
        Category::Operation => {
            let sets: [&[Operation]; 8] = [
                &[Operation::RcSend],
                &[Operation::RcWrite],
                &[Operation::RcRead],
                &[Operation::UdSend],
                &[Operation::UcSend],
                &[Operation::UcWrite],
                &[Operation::RcSend, Operation::RcWrite, Operation::RcRead],
                &[Operation::RcWrite, Operation::UcWrite],
            ];
            sets[rng.random_range(0..sets.len())]
                .iter()
                .copied()
                .map(Choice::Operation)
                .collect()
        }
        Category::Direction => {
            let value = if rng.random_bool(0.8) {
                Direction::Bidirectional
            } else {
                Direction::Loopback
            };
            vec![Choice::Direction(value)]
        }
        Category::Mtu => vec![Choice::Mtu([1024, 2048, 4096][rng.random_range(0..3)])],
        Category::MemoryA | Category::MemoryB => {
            vec![Choice::Memory(if rng.random_bool(0.5) {
                Memory::Dram(1)
            } else {
                Memory::Gpu(0)
            })]
        }
    }
}
