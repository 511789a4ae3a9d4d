//! What can be said about a point: its numbers, its categories, and the products and ratios that conditions speak of.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::point::{Direction, Memory, Operation, Point};

/// A number of a point. Every axis is searched on a log scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Axis {
    /// Queue pairs in each direction.
    Qps,
    /// Memory regions of a queue pair.
    Regions,
    /// Bytes of a region.
    RegionBytes,
    /// Work requests of a doorbell.
    Batch,
    /// Depth of the send queue.
    SendDepth,
    /// Depth of the receive queue.
    ReceiveDepth,
    /// Scatter/gather elements of a work request.
    Sges,
    /// Bytes of the smallest message.
    SmallestBytes,
    /// Bytes of the largest message.
    LargestBytes,
    /// Messages until the sequence of sizes repeats.
    Messages,
}

impl Axis {
    /// All of them. The length of the sequence comes last: cutting a sequence changes its sizes too.
    pub const ALL: [Axis; 10] = [
        Axis::Qps,
        Axis::Regions,
        Axis::RegionBytes,
        Axis::Batch,
        Axis::SendDepth,
        Axis::ReceiveDepth,
        Axis::Sges,
        Axis::SmallestBytes,
        Axis::LargestBytes,
        Axis::Messages,
    ];

    /// The value at a point.
    pub fn of(self, point: &Point) -> u32 {
        match self {
            Axis::Qps => point.qps,
            Axis::Regions => point.regions,
            Axis::RegionBytes => point.region_bytes,
            Axis::Batch => point.batch,
            Axis::SendDepth => point.send_depth,
            Axis::ReceiveDepth => point.receive_depth,
            Axis::Sges => point.sges,
            Axis::SmallestBytes => point.smallest(),
            Axis::LargestBytes => point.largest(),
            Axis::Messages => point.messages.len() as u32,
        }
    }

    /// Whether the traffic of a point can depend on this axis.
    pub fn applies(self, point: &Point) -> bool {
        self != Axis::ReceiveDepth || point.operation.consumes_receives()
    }

    /// The option of `volley vet probe` and the key of a space file.
    pub fn name(self) -> &'static str {
        match self {
            Axis::Qps => "qps",
            Axis::Regions => "regions",
            Axis::RegionBytes => "region-bytes",
            Axis::Batch => "batch",
            Axis::SendDepth => "send-depth",
            Axis::ReceiveDepth => "receive-depth",
            Axis::Sges => "sges",
            Axis::SmallestBytes => "smallest-bytes",
            Axis::LargestBytes => "largest-bytes",
            Axis::Messages => "messages",
        }
    }

    /// Whether its values are bytes.
    pub fn is_bytes(self) -> bool {
        matches!(
            self,
            Axis::RegionBytes | Axis::SmallestBytes | Axis::LargestBytes
        )
    }

    fn words(self) -> &'static str {
        match self {
            Axis::Qps => "queue pairs",
            Axis::Regions => "regions per queue pair",
            Axis::RegionBytes => "region length",
            Axis::Batch => "doorbell batch",
            Axis::SendDepth => "send queue depth",
            Axis::ReceiveDepth => "receive queue depth",
            Axis::Sges => "scatter/gather elements",
            Axis::SmallestBytes => "smallest message",
            Axis::LargestBytes => "largest message",
            Axis::Messages => "message sizes in the sequence",
        }
    }
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.words())
    }
}

/// A setting that has names for values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Category {
    /// Transport and verb.
    Operation,
    /// Which way data flows.
    Direction,
    /// Path MTU: few values, so a name.
    Mtu,
    /// Memory of host A.
    MemoryA,
    /// Memory of host B.
    MemoryB,
}

impl Category {
    /// All of them.
    pub const ALL: [Category; 5] = [
        Category::Operation,
        Category::Direction,
        Category::Mtu,
        Category::MemoryA,
        Category::MemoryB,
    ];

    /// The value at a point.
    pub fn of(self, point: &Point) -> Choice {
        match self {
            Category::Operation => Choice::Operation(point.operation),
            Category::Direction => Choice::Direction(point.direction),
            Category::Mtu => Choice::Mtu(point.mtu),
            Category::MemoryA => Choice::Memory(point.memory_a),
            Category::MemoryB => Choice::Memory(point.memory_b),
        }
    }

    /// The option of `volley vet probe` and the key of a space file.
    pub fn name(self) -> &'static str {
        match self {
            Category::Operation => "operation",
            Category::Direction => "direction",
            Category::Mtu => "mtu",
            Category::MemoryA => "memory-a",
            Category::MemoryB => "memory-b",
        }
    }
}

impl fmt::Display for Category {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Category::Operation => "operation",
            Category::Direction => "direction",
            Category::Mtu => "MTU",
            Category::MemoryA => "memory of host A",
            Category::MemoryB => "memory of host B",
        })
    }
}

/// A value of a category.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Choice {
    /// Of [`Category::Operation`].
    Operation(Operation),
    /// Of [`Category::Direction`].
    Direction(Direction),
    /// Of [`Category::Mtu`], bytes.
    Mtu(u32),
    /// Of [`Category::MemoryA`] and [`Category::MemoryB`].
    Memory(Memory),
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Choice::Operation(operation) => operation.fmt(f),
            Choice::Direction(direction) => direction.fmt(f),
            Choice::Mtu(bytes) => bytes.fmt(f),
            Choice::Memory(memory) => memory.fmt(f),
        }
    }
}

/// Something that one mutation changes: a dimension of the space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Feature {
    /// A number.
    Axis(Axis),
    /// A name.
    Category(Category),
}

impl Feature {
    /// Every dimension, categories first.
    pub fn all() -> impl Iterator<Item = Feature> {
        Category::ALL
            .into_iter()
            .map(Feature::Category)
            .chain(Axis::ALL.into_iter().map(Feature::Axis))
    }

    /// The option of `volley vet probe` and the key of a space file.
    pub fn name(self) -> &'static str {
        match self {
            Feature::Axis(axis) => axis.name(),
            Feature::Category(category) => category.name(),
        }
    }

    /// Whether two points agree in it.
    pub fn agrees(self, a: &Point, b: &Point) -> bool {
        match self {
            Feature::Axis(axis) => {
                axis.of(a) == axis.of(b) || !(axis.applies(a) || axis.applies(b))
            }
            Feature::Category(category) => category.of(a) == category.of(b),
        }
    }
}

/// A number that a condition bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quantity {
    /// One axis.
    Axis(Axis),
    /// The product of two: what a cache must hold, as queue pairs times regions.
    Product(Axis, Axis),
    /// The first over the second: how full something is, as batch over depth.
    Ratio(Axis, Axis),
}

impl Quantity {
    /// The value at a point.
    pub fn of(self, point: &Point) -> f64 {
        match self {
            Quantity::Axis(axis) => f64::from(axis.of(point)),
            Quantity::Product(a, b) => f64::from(a.of(point)) * f64::from(b.of(point)),
            Quantity::Ratio(a, b) => f64::from(a.of(point)) / f64::from(b.of(point)),
        }
    }

    /// Whether it speaks of this axis.
    pub fn involves(self, axis: Axis) -> bool {
        match self {
            Quantity::Axis(only) => only == axis,
            Quantity::Product(a, b) | Quantity::Ratio(a, b) => a == axis || b == axis,
        }
    }

    /// Whether the traffic of a point can depend on it.
    pub fn applies(self, point: &Point) -> bool {
        match self {
            Quantity::Axis(axis) => axis.applies(point),
            Quantity::Product(a, b) | Quantity::Ratio(a, b) => a.applies(point) && b.applies(point),
        }
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Quantity::Axis(axis) => axis.fmt(f),
            Quantity::Product(a, b) => write!(f, "{a} x {b}"),
            Quantity::Ratio(a, b) => write!(f, "{a} / {b}"),
        }
    }
}
