//! The search space: which points exist, how one is drawn, and how one setting of it is changed.
//!
//! Points are valid by construction. A change that would break a rule of the verbs API takes the setting that depends on it along, and never
//! the one that was asked for: a batch of 128 deepens a send queue of 16; a datagram keeps its messages within the MTU.

mod command;
mod feature;
mod point;

use std::collections::BTreeMap;

use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

pub use command::{perftest_command, probe_command};
pub use feature::{Axis, Category, Choice, Feature, Quantity};
pub use point::{Direction, Memory, Operation, Point, UnknownName};

/// The ranges that a search may use. Read from a TOML or JSON file it restricts a search to what an application does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct Space {
    /// Transports and verbs.
    pub operation: Vec<Operation>,
    /// Directions.
    pub direction: Vec<Direction>,
    /// Path MTUs, bytes.
    pub mtu: Vec<u32>,
    /// Where host A's buffers may lie.
    pub memory_a: Vec<Memory>,
    /// Where host B's buffers may lie.
    pub memory_b: Vec<Memory>,
    /// First and last value of each axis; the message axes share one range in bytes, so the two must be equal.
    pub axes: BTreeMap<Axis, (u32, u32)>,
    /// Regions of all queue pairs of a direction together.
    pub regions_total_max: u32,
}

impl Default for Space {
    /// The published space: near and far memory of a two-socket host with a GPU, and WRITE WITH IMMEDIATE, which serving systems use.
    fn default() -> Self {
        Space {
            operation: Operation::ALL.to_vec(),
            direction: Direction::ALL.to_vec(),
            mtu: vec![1024, 2048, 4096],
            memory_a: vec![Memory::Dram(0), Memory::Dram(1), Memory::Gpu(0)],
            memory_b: vec![Memory::Dram(0), Memory::Dram(1), Memory::Gpu(0)],
            axes: Space::published_axes(20_000),
            regions_total_max: 200_000,
        }
    }
}

/// Why a space cannot be searched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpaceError {
    /// A category without values.
    #[error("the space allows no value of '{0}': give at least one")]
    Empty(&'static str),
    /// A range that holds nothing, or zero, or more than the verbs API has.
    #[error(
        "the range of '{axis}' is {first} to {last}: give first <= last, within {low} to {high}"
    )]
    Range {
        /// Its key.
        axis: &'static str,
        /// As given.
        first: u32,
        /// As given.
        last: u32,
        /// The least that exists.
        low: u32,
        /// The most that exists.
        high: u32,
    },
    /// An MTU that InfiniBand does not have.
    #[error("an MTU of {0} does not exist: give 256, 512, 1024, 2048 or 4096")]
    Mtu(u32),
    /// The two message axes differ.
    #[error("'smallest-bytes' and 'largest-bytes' must have one range: a message is drawn from it")]
    MessageRange,
    /// Datagrams only, and none of them fits.
    #[error(
        "'ud-send' messages must fit the MTU, but the least message is {least} bytes and the least MTU {mtu}"
    )]
    Datagram {
        /// The least message, bytes.
        least: u32,
        /// The least MTU, bytes.
        mtu: u32,
    },
}

/// Why a point is none of a space.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the workload's {what} is {value}: {expected}")]
pub struct OutsideSpace {
    what: String,
    value: String,
    expected: String,
}

/// What the verbs API and real adapters allow of an axis.
fn bounds(axis: Axis) -> (u32, u32) {
    match axis {
        Axis::Qps => (1, 1 << 20),
        Axis::Regions => (1, 1 << 20),
        Axis::RegionBytes => (32, 1 << 30),
        Axis::Batch => (1, 1 << 14),
        Axis::SendDepth | Axis::ReceiveDepth => (1, 1 << 15),
        Axis::Sges => (1, 30),
        Axis::SmallestBytes | Axis::LargestBytes => (32, 1 << 30),
        Axis::Messages => (1, 64),
    }
}

/// One changed setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// A number.
    Axis(Axis, u32),
    /// A name.
    Choice(Category, Choice),
}

impl Setting {
    /// What it changes.
    pub fn feature(self) -> Feature {
        match self {
            Setting::Axis(axis, _) => Feature::Axis(axis),
            Setting::Choice(category, _) => Feature::Category(category),
        }
    }

    /// The setting of a feature that a point has.
    pub fn of(feature: Feature, point: &Point) -> Setting {
        match feature {
            Feature::Axis(axis) => Setting::Axis(axis, axis.of(point)),
            Feature::Category(category) => Setting::Choice(category, category.of(point)),
        }
    }
}

impl Space {
    /// The published ranges, to this many queue pairs.
    pub fn published_axes(qps_max: u32) -> BTreeMap<Axis, (u32, u32)> {
        BTreeMap::from([
            (Axis::Qps, (1, qps_max)),
            (Axis::Regions, (1, 1024)),
            (Axis::RegionBytes, (4096, 4 << 20)),
            (Axis::Batch, (1, 128)),
            (Axis::SendDepth, (1, 4096)),
            (Axis::ReceiveDepth, (1, 4096)),
            (Axis::Sges, (1, 16)),
            (Axis::SmallestBytes, (32, 4 << 20)),
            (Axis::LargestBytes, (32, 4 << 20)),
            (Axis::Messages, (1, 8)),
        ])
    }

    /// Checks that it holds at least one point and nothing that the verbs API lacks; axes that a file left out get their published range.
    ///
    /// # Errors
    /// [`SpaceError`] names the key.
    pub fn checked(mut self) -> Result<Self, SpaceError> {
        for (axis, range) in Space::published_axes(20_000) {
            self.axes.entry(axis).or_insert(range);
        }
        for (empty, name) in [
            (self.operation.is_empty(), "operation"),
            (self.direction.is_empty(), "direction"),
            (self.mtu.is_empty(), "mtu"),
            (self.memory_a.is_empty(), "memory-a"),
            (self.memory_b.is_empty(), "memory-b"),
        ] {
            if empty {
                return Err(SpaceError::Empty(name));
            }
        }
        for (&axis, &(first, last)) in &self.axes {
            let (low, high) = bounds(axis);
            if first > last || first < low || last > high {
                return Err(SpaceError::Range {
                    axis: axis.name(),
                    first,
                    last,
                    low,
                    high,
                });
            }
        }
        if let Some(&mtu) = self
            .mtu
            .iter()
            .find(|mtu| ![256, 512, 1024, 2048, 4096].contains(*mtu))
        {
            return Err(SpaceError::Mtu(mtu));
        }
        let message = self.range(Axis::SmallestBytes);
        if message != self.range(Axis::LargestBytes) {
            return Err(SpaceError::MessageRange);
        }
        let mtu = self.mtu.iter().copied().min().unwrap_or(0);
        if self.operation.contains(&Operation::UdSend) && message.0 > mtu {
            return Err(SpaceError::Datagram {
                least: message.0,
                mtu,
            });
        }
        Ok(self)
    }

    /// First and last value of an axis.
    pub fn range(&self, axis: Axis) -> (u32, u32) {
        self.axes[&axis]
    }

    /// The least and the greatest value a quantity can have.
    pub fn extent(&self, quantity: Quantity) -> (f64, f64) {
        let range = |axis| {
            let (low, high) = self.range(axis);
            (f64::from(low), f64::from(high))
        };
        match quantity {
            Quantity::Axis(axis) => range(axis),
            Quantity::Product(a, b) => (range(a).0 * range(b).0, range(a).1 * range(b).1),
            Quantity::Ratio(a, b) => (range(a).0 / range(b).1, range(a).1 / range(b).0),
        }
    }

    /// First and last value of an axis that a point may be given without losing another setting.
    pub fn range_at(&self, axis: Axis, point: &Point) -> (u32, u32) {
        let (low, high) = self.range(axis);
        match axis {
            Axis::SmallestBytes | Axis::LargestBytes if point.operation.is_datagram() => {
                (low, high.min(point.mtu))
            }
            Axis::RegionBytes => (low.max(point.largest().min(high)), high),
            _ => (low, high),
        }
    }

    /// The values of a category.
    pub fn choices(&self, category: Category) -> Vec<Choice> {
        match category {
            Category::Operation => self
                .operation
                .iter()
                .copied()
                .map(Choice::Operation)
                .collect(),
            Category::Direction => self
                .direction
                .iter()
                .copied()
                .map(Choice::Direction)
                .collect(),
            Category::Mtu => self.mtu.iter().copied().map(Choice::Mtu).collect(),
            Category::MemoryA => self.memory_a.iter().copied().map(Choice::Memory).collect(),
            Category::MemoryB => self.memory_b.iter().copied().map(Choice::Memory).collect(),
        }
    }

    /// A point drawn at random: names uniformly (GPU memory one time in five), numbers log-uniformly, half of the sequences of one size.
    pub fn sample(&self, rng: &mut impl Rng) -> Point {
        let pick = |list: &[Memory], rng: &mut dyn FnMut(usize) -> usize, gpu: bool| {
            let kind: Vec<Memory> = list
                .iter()
                .copied()
                .filter(|m| matches!(m, Memory::Gpu(_)) == gpu)
                .collect();
            let list = if kind.is_empty() { list } else { &kind };
            list[rng(list.len())]
        };
        let operation = self.operation[rng.random_range(0..self.operation.len())];
        let direction = self.direction[rng.random_range(0..self.direction.len())];
        let mtu = self.mtu[rng.random_range(0..self.mtu.len())];
        let (gpu_a, gpu_b) = (rng.random_bool(0.2), rng.random_bool(0.2));
        let memory_a = pick(&self.memory_a, &mut |n| rng.random_range(0..n), gpu_a);
        let memory_b = pick(&self.memory_b, &mut |n| rng.random_range(0..n), gpu_b);
        let mut number = |axis: Axis| log_uniform(self.range(axis), rng);
        let (qps, regions, region_bytes) = (
            number(Axis::Qps),
            number(Axis::Regions),
            number(Axis::RegionBytes),
        );
        let (send_depth, receive_depth) = (number(Axis::SendDepth), number(Axis::ReceiveDepth));
        let (batch, sges) = (number(Axis::Batch), number(Axis::Sges));
        let (first, last) = self.range(Axis::LargestBytes);
        let sizes = (
            first,
            if operation.is_datagram() {
                last.min(mtu)
            } else {
                last
            },
        );
        let (shortest, longest) = self.range(Axis::Messages);
        let length = rng.random_range(shortest..=longest);
        let messages = if rng.random_bool(0.5) {
            vec![log_uniform(sizes, rng); length as usize]
        } else {
            (0..length).map(|_| log_uniform(sizes, rng)).collect()
        };
        let mut point = Point {
            operation,
            direction,
            mtu,
            memory_a,
            memory_b,
            qps,
            regions,
            region_bytes,
            batch,
            send_depth,
            receive_depth,
            sges,
            messages,
        };
        self.repair(&mut point, None);
        point
    }

    /// The point with one setting changed, and what depends on it.
    pub fn with(&self, point: &Point, setting: Setting) -> Point {
        let mut changed = point.clone();
        match setting {
            Setting::Choice(_, Choice::Operation(operation)) => changed.operation = operation,
            Setting::Choice(_, Choice::Direction(direction)) => changed.direction = direction,
            Setting::Choice(_, Choice::Mtu(mtu)) => changed.mtu = mtu,
            Setting::Choice(Category::MemoryB, Choice::Memory(memory)) => changed.memory_b = memory,
            Setting::Choice(_, Choice::Memory(memory)) => changed.memory_a = memory,
            Setting::Axis(axis, value) => {
                let (low, high) = self.range_at(axis, point);
                let value = value.clamp(low, high.max(low));
                match axis {
                    Axis::Qps => changed.qps = value,
                    Axis::Regions => changed.regions = value,
                    Axis::RegionBytes => changed.region_bytes = value,
                    Axis::Batch => changed.batch = value,
                    Axis::SendDepth => changed.send_depth = value,
                    Axis::ReceiveDepth => changed.receive_depth = value,
                    Axis::Sges => changed.sges = value,
                    Axis::SmallestBytes => {
                        resize(&mut changed.messages, value, point.largest().max(value))
                    }
                    Axis::LargestBytes => {
                        resize(&mut changed.messages, point.smallest().min(value), value)
                    }
                    Axis::Messages => relength(&mut changed.messages, value as usize),
                }
            }
        }
        self.repair(&mut changed, Some(setting.feature()));
        changed
    }

    /// Whether a point is one of the space.
    ///
    /// # Errors
    /// [`OutsideSpace`] names the setting.
    pub fn admits(&self, point: &Point) -> Result<(), OutsideSpace> {
        let outside = |what: &dyn std::fmt::Display, value: String, expected: String| {
            Err(OutsideSpace {
                what: what.to_string(),
                value,
                expected,
            })
        };
        for category in Category::ALL {
            let (choice, all) = (category.of(point), self.choices(category));
            if !all.contains(&choice) {
                let all: Vec<String> = all.iter().map(Choice::to_string).collect();
                return outside(
                    &category,
                    choice.to_string(),
                    format!("the space has {}", all.join(", ")),
                );
            }
        }
        for axis in Axis::ALL {
            let (value, (low, high)) = (axis.of(point), self.range_at(axis, point));
            if axis.applies(point) && !(low..=high).contains(&value) {
                return outside(
                    &axis,
                    value.to_string(),
                    format!("the space allows {low} to {high} here"),
                );
            }
        }
        if point.batch > point.send_depth {
            return outside(
                &Axis::Batch,
                point.batch.to_string(),
                "a send queue must hold its batch".to_owned(),
            );
        }
        let regions = u64::from(point.qps) * u64::from(point.regions);
        if regions > u64::from(self.regions_total_max) {
            let expected = format!(
                "with {} queue pairs the space allows {} in all",
                point.qps, self.regions_total_max
            );
            return outside(&Axis::Regions, point.regions.to_string(), expected);
        }
        Ok(())
    }

    /// Makes a point valid; `kept` is changed only where nothing else can give way.
    fn repair(&self, point: &mut Point, kept: Option<Feature>) {
        if point.operation.is_datagram() {
            let smallest_allowed = self.range(Axis::SmallestBytes).0;
            for size in &mut point.messages {
                *size = (*size).min(point.mtu).max(smallest_allowed);
            }
        }
        let largest = point.largest();
        point.region_bytes = point.region_bytes.max(largest);
        if point.batch > point.send_depth {
            if kept == Some(Feature::Axis(Axis::Batch)) {
                point.send_depth = point.batch;
            } else {
                point.batch = point.send_depth;
            }
        }
        let most = self.regions_total_max;
        if u64::from(point.qps) * u64::from(point.regions) > u64::from(most) {
            if kept == Some(Feature::Axis(Axis::Regions)) {
                point.qps = (most / point.regions).max(1);
            }
            point.regions = point.regions.min((most / point.qps).max(1));
        }
    }
}

/// An integer whose logarithm is uniform between those of `low` and `high`, both included.
fn log_uniform((low, high): (u32, u32), rng: &mut impl Rng) -> u32 {
    let span = (f64::from(high) + 1.0) / f64::from(low);
    let value = f64::from(low) * span.powf(rng.random::<f64>());
    (value as u32).clamp(low, high)
}

/// Stretches the sizes, on a log scale, so that they reach from `smallest` to `largest`.
fn resize(messages: &mut Vec<u32>, smallest: u32, largest: u32) {
    let (low, high) = (
        messages.iter().min().copied().unwrap_or(1),
        messages.iter().max().copied().unwrap_or(1),
    );
    if low == high {
        // Sizes all alike: a spread needs two sizes at least.
        messages.fill(largest);
        if smallest < largest {
            if messages.len() == 1 {
                messages.push(largest);
            }
            messages[0] = smallest;
        }
        return;
    }
    let (from, to) = (f64::from(low).ln(), f64::from(high).ln());
    let (first, last) = (f64::from(smallest).ln(), f64::from(largest).ln());
    for size in messages {
        *size = match *size {
            size if size == low => smallest,
            size if size == high => largest,
            size => {
                let share = (f64::from(size).ln() - from) / (to - from);
                ((first + share * (last - first)).exp().round() as u32).clamp(smallest, largest)
            }
        };
    }
}

/// Cuts or repeats the sequence, keeping its smallest and its largest size while it has room for both.
fn relength(messages: &mut Vec<u32>, length: usize) {
    let (smallest, largest) = (
        messages.iter().min().copied().unwrap_or(1),
        messages.iter().max().copied().unwrap_or(1),
    );
    let old = messages.clone();
    *messages = old.iter().copied().cycle().take(length).collect();
    if let Some(first) = messages.first_mut() {
        *first = largest;
    }
    if length > 1 {
        messages[1] = smallest;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_pcg::Pcg64;

    use super::*;

    proptest! {
        #[test]
        fn what_is_drawn_or_changed_is_a_point_of_the_space(seed: u64, changes in 1usize..20) {
            let space = Space::default();
            let mut rng = Pcg64::seed_from_u64(seed);
            let mut point = space.sample(&mut rng);
            prop_assert_eq!(space.admits(&point), Ok(()));
            for _ in 0..changes {
                let other = space.sample(&mut rng);
                let features: Vec<Feature> = Feature::all().collect();
                let feature = features[rng.random_range(0..features.len())];
                let setting = Setting::of(feature, &other);
                point = space.with(&point, setting);
                prop_assert_eq!(space.admits(&point), Ok(()), "after {:?}", setting);
                // What was asked for is what is there, but for what the datagram's MTU and the largest message forbid.
                if let Setting::Axis(axis, value) = setting {
                    let (low, high) = space.range_at(axis, &point);
                    prop_assert_eq!(axis.of(&point), value.clamp(low, high), "{:?} {:?}", setting, point);
                }
            }
        }
    }

    #[test]
    fn a_batch_deepens_its_queue_and_a_shallow_queue_cuts_the_batch() {
        let space = Space::default();
        let mut point = space.sample(&mut Pcg64::seed_from_u64(1));
        point.batch = 1;
        point.send_depth = 4;
        let point = space.with(&point, Setting::Axis(Axis::Batch, 64));
        assert_eq!((point.batch, point.send_depth), (64, 64));
        let point = space.with(&point, Setting::Axis(Axis::SendDepth, 8));
        assert_eq!((point.batch, point.send_depth), (8, 8));
    }

    #[test]
    fn sizes_stretch_between_their_ends() {
        let mut messages = vec![128, 1024, 65536];
        resize(&mut messages, 32, 65536);
        assert_eq!((messages[0], messages[2]), (32, 65536));
        assert!((32..1024).contains(&messages[1]));
        let mut one = vec![4096];
        resize(&mut one, 128, 4096);
        assert_eq!(one, [128, 4096]);
        relength(&mut one, 1);
        assert_eq!(one, [4096]);
    }

    #[test]
    fn a_space_that_holds_nothing_says_which_key() {
        let mut space = Space::default();
        space.direction.clear();
        assert_eq!(space.checked(), Err(SpaceError::Empty("direction")));
        let mut space = Space::default();
        space.axes.insert(Axis::Sges, (4, 2));
        assert!(space.checked().unwrap_err().to_string().contains("'sges'"));
        let space = Space {
            mtu: vec![1500],
            ..Space::default()
        };
        assert_eq!(space.checked(), Err(SpaceError::Mtu(1500)));
    }
}
