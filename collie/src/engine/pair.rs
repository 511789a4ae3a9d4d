//! Two adapters as a subsystem: both ends set up, connected, run and taken down, and what they saw put together.

use std::time::{Duration, Instant};

use super::calibration::{Calibration, Owed, plan};
use super::end::{LocalEnd, space};
use super::flow::{Flow, Half, Side, halves};
use super::message::{Facts, HalfOffer, Reading, Task, Timing};
use super::remote::RemoteEnd;
use super::samples::measurement;
use super::{End, EngineError};
use crate::space::{Axis, Memory, Point, Space};
use crate::subsystem::{Bound, Measurement, Probe, SetupFailed, Subsystem};

/// Where the two adapters are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Devices of hosts A and B, as in `/sys/class/infiniband`.
    pub devices: [String; 2],
    /// Their ports.
    pub ports: [u8; 2],
    /// Management address of host B's agent; none where host B is this host.
    pub agent: Option<String>,
}

impl std::fmt::Display for Place {
    /// What reports call the two: `mlx5_0,mlx5_1`, or `mlx5_0,mlx5_0@HOST:PORT` with an agent.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let device = |at: usize| match self.ports[at] {
            1 => self.devices[at].clone(),
            port => format!("{}:{port}", self.devices[at]),
        };
        write!(f, "{},{}", device(0), device(1))?;
        match &self.agent {
            Some(agent) => write!(f, "@{agent}"),
            None => Ok(()),
        }
    }
}

/// How far a calibration has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Workloads measured.
    pub done: usize,
    /// Workloads to measure.
    pub all: usize,
}

/// Two adapters, driven.
pub struct Adapters {
    name: String,
    ends: [Box<dyn End>; 2],
    space: Space,
    counters: Vec<String>,
    timing: Timing,
    /// Wall-clock limit of a probe.
    limit: Duration,
    calibration: Calibration,
}

impl Adapters {
    /// Opens both ends. Until [`Adapters::calibrated`] says otherwise, workloads are owed nothing: pauses and losses are all that can be judged.
    ///
    /// # Errors
    /// An end cannot be opened, or the two have no workload in common.
    pub fn open(place: &Place, timing: Timing, limit: Duration) -> Result<Self, EngineError> {
        let [a, b] = &place.devices;
        let first: Box<dyn End> = Box::new(LocalEnd::open(a, place.ports[0])?);
        let second: Box<dyn End> = match &place.agent {
            Some(address) => Box::new(RemoteEnd::call(address, b, place.ports[1])?),
            None => Box::new(LocalEnd::open(b, place.ports[1])?),
        };
        let mut counters = first.facts().counters.clone();
        counters.extend(second.facts().counters.iter().cloned());
        counters.sort();
        counters.dedup();
        Ok(Adapters {
            name: place.to_string(),
            space: common(first.facts(), second.facts())?,
            ends: [first, second],
            counters,
            timing,
            limit,
            calibration: Calibration::default(),
        })
    }

    /// Keeps to the workloads that a space has too.
    ///
    /// # Errors
    /// There is none.
    pub fn restrict(&mut self, wanted: &Space) -> Result<(), EngineError> {
        self.space = intersection(&self.space, wanted)?;
        Ok(())
    }

    /// Measures what the adapters owe the workloads of their space, by plain traffic.
    ///
    /// # Errors
    /// The first plain workload that neither of its forms could run.
    pub fn calibrate(
        &mut self,
        told: &mut dyn FnMut(Progress),
    ) -> Result<Calibration, EngineError> {
        let plan = plan(&self.space);
        let all = plan.len();
        let mut owed: Vec<Owed> = Vec::new();
        for (done, plain) in plan.into_iter().enumerate() {
            told(Progress { done, all });
            let mut best: Option<Owed> = None;
            let mut failed = None;
            for point in &plain.points {
                let measured = match self.measure(point) {
                    Ok(measured) => measured,
                    Err(error) => {
                        failed = Some(error);
                        continue;
                    }
                };
                let reached = reached(point, &measured);
                if best
                    .as_ref()
                    .is_none_or(|best| reached.0 > best.messages_per_s)
                {
                    best = Some(Owed {
                        operation: plain.operation,
                        direction: plain.direction,
                        mtu: plain.mtu,
                        bytes: plain.bytes,
                        messages_per_s: reached.0,
                        loss: reached.1,
                    });
                }
            }
            match (best, failed) {
                (Some(best), _) => owed.push(best),
                (None, Some(error)) => return Err(error),
                (None, None) => unreachable!("each plain workload has a form"),
            }
        }
        told(Progress { done: all, all });
        Ok(Calibration {
            subsystem: self.name.clone(),
            owed,
        })
    }

    /// From now on workloads are owed what was measured here.
    pub fn calibrated(&mut self, calibration: Calibration) {
        self.calibration = calibration;
    }

    /// Runs one workload. Whatever happens, both ends are taken down.
    fn measure(&mut self, point: &Point) -> Result<Measurement, EngineError> {
        let readings = self.readings(point);
        // Readings are taken: what breaks from now on breaks because its other end is gone.
        let first = self.ends[1].finish();
        let second = self.ends[0].finish();
        let readings = readings?;
        first?;
        second?;
        measurement(point, [&readings[0], &readings[1]], &self.counters)
            .map_err(EngineError::Broken)
    }

    fn readings(&mut self, point: &Point) -> Result<[Vec<Reading>; 2], EngineError> {
        let limit_ms = self.limit.as_millis() as u64;
        let task = |side| Task {
            point: point.clone(),
            side,
            limit_ms,
        };
        let [a, b] = &mut self.ends;
        let tasks = [task(Side::A), task(Side::B)];
        let offers = both(|| a.prepare(&tasks[0]), || b.prepare(&tasks[1]))?;
        let peers = counterparts(point, &offers)?;
        both(|| a.connect(&peers[0]), || b.connect(&peers[1]))?;
        let timing = self.timing;
        both(|| a.run(timing), || b.run(timing))
    }
}

impl Subsystem for Adapters {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn space(&self) -> &Space {
        &self.space
    }

    fn counters(&self) -> &[String] {
        &self.counters
    }

    /// What was measured of such workloads; a bit and a packet a second where nothing was, so that whatever arrives is enough.
    fn bound(&self, point: &Point) -> Bound {
        self.calibration.bound(point).unwrap_or(Bound {
            bits_per_s: 1.0,
            packets_per_s: 1.0,
        })
    }

    fn probe(&mut self, point: &Point) -> Probe {
        let began = Instant::now();
        let outcome = self.measure(point);
        Probe {
            seconds: began.elapsed().as_secs_f64(),
            outcome: outcome.map_err(|error| SetupFailed(error.to_string())),
        }
    }
}

/// Both ends at once. The first error of the two.
fn both<T: Send>(
    a: impl FnOnce() -> Result<T, EngineError> + Send,
    b: impl FnOnce() -> Result<T, EngineError> + Send,
) -> Result<[T; 2], EngineError> {
    let (a, b) = std::thread::scope(|scope| {
        let b = scope.spawn(b);
        (a(), b.join())
    });
    let b = b.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    Ok([a?, b?])
}

/// For each half of each end, the offer of the half that it is to be connected to.
fn counterparts(
    point: &Point,
    offers: &[Vec<HalfOffer>; 2],
) -> Result<[Vec<HalfOffer>; 2], EngineError> {
    let flows = Flow::of(point);
    let find = |half: &Half| {
        let flow = flows[half.flow];
        let there = match half.requests {
            true => flow.responder(point.operation),
            false => flow.requester(point.operation),
        };
        let other = Half {
            flow: half.flow,
            requests: !half.requests,
        };
        let at = halves(point, there).iter().position(|half| *half == other);
        let offer = at.and_then(|at| offers[there as usize].get(at));
        offer.cloned().ok_or(EngineError::OutOfTurn)
    };
    let of = |side| -> Result<Vec<HalfOffer>, EngineError> {
        halves(point, side).iter().map(find).collect()
    };
    Ok([of(Side::A)?, of(Side::B)?])
}

/// Messages a second at the receiving end where fewer arrived, and the greatest loss: medians over the samples.
fn reached(point: &Point, measured: &Measurement) -> (f64, f64) {
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values.get(values.len() / 2).copied().unwrap_or(0.0)
    };
    let bits_of_message = 8.0 * point.mean_bytes();
    let ends = measured.ends.iter();
    let messages = ends
        .clone()
        .filter(|end| end.iter().any(|sample| sample.packets_per_s > 0.0))
        .map(|end| median(end.iter().map(|s| s.bits_per_s / bits_of_message).collect()))
        .reduce(f64::min);
    let loss = ends.map(|end| median(end.iter().map(|s| s.loss_ratio).collect()));
    (messages.unwrap_or(0.0), loss.fold(0.0, f64::max))
}

/// The workloads that two ends can both run.
fn common(a: &Facts, b: &Facts) -> Result<Space, EngineError> {
    let (mut space_a, space_b) = (space(a), space(b));
    space_a.memory_b.clone_from(&space_b.memory_b);
    let mut both = space_b;
    both.memory_a.clone_from(&space_a.memory_a);
    intersection(&space_a, &both)
}

/// The workloads of both spaces.
fn intersection(a: &Space, b: &Space) -> Result<Space, EngineError> {
    fn shared<T: PartialEq + Copy>(what: &str, a: &[T], b: &[T]) -> Result<Vec<T>, EngineError> {
        let shared: Vec<T> = a.iter().copied().filter(|v| b.contains(v)).collect();
        match shared.is_empty() {
            false => Ok(shared),
            true => Err(EngineError::NothingInCommon(format!(
                "the adapters offer no {what} that was asked for"
            ))),
        }
    }
    let mut axes = a.axes.clone();
    for (axis, range) in &mut axes {
        let other: (u32, u32) = b.range(*axis);
        *range = (range.0.max(other.0), range.1.min(other.1));
        if range.0 > range.1 {
            return Err(EngineError::NothingInCommon(format!(
                "of '{}' {} at least was asked for, and {} is the most",
                Axis::name(*axis),
                range.0,
                range.1
            )));
        }
    }
    let space = Space {
        operation: shared("operation", &a.operation, &b.operation)?,
        direction: shared("direction", &a.direction, &b.direction)?,
        mtu: shared("MTU", &a.mtu, &b.mtu)?,
        memory_a: shared::<Memory>("memory at host A", &a.memory_a, &b.memory_a)?,
        memory_b: shared::<Memory>("memory at host B", &a.memory_b, &b.memory_b)?,
        axes,
        regions_total_max: a.regions_total_max.min(b.regions_total_max),
    };
    let checked = space.checked();
    checked.map_err(|error| EngineError::NothingInCommon(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::space::{Direction, Operation};

    fn facts(device: &str, mtu: u32, nodes: &[u8]) -> Facts {
        Facts {
            device: device.to_owned(),
            queue_pairs: 3000,
            queue_depth: 1000,
            sges: 30,
            regions: 1 << 20,
            mtu,
            nodes: nodes.to_vec(),
            counters: Vec::new(),
        }
    }

    #[test]
    fn two_ends_run_what_both_can() {
        let space = common(&facts("a", 4096, &[0, 1]), &facts("b", 1024, &[0])).unwrap();
        assert_eq!(space.mtu, [256, 512, 1024]);
        assert_eq!(space.memory_a, [Memory::Dram(0), Memory::Dram(1)]);
        assert_eq!(space.memory_b, [Memory::Dram(0)]);
        assert_eq!(space.range(Axis::Qps), (1, 1000));
        assert_eq!(space.range(Axis::SendDepth), (1, 1000));
        let wanted = Space {
            operation: vec![Operation::RcRead],
            mtu: vec![1024, 4096],
            ..Space::default()
        };
        let wanted = intersection(&space, &wanted).unwrap();
        assert_eq!(
            (wanted.mtu, wanted.operation),
            (vec![1024], vec![Operation::RcRead])
        );
        let wanted = Space {
            mtu: vec![4096],
            ..Space::default()
        };
        let error = intersection(&space, &wanted).unwrap_err().to_string();
        assert!(error.contains("no MTU that was asked for"), "{error}");
    }

    #[test]
    fn each_half_is_given_the_offer_of_its_other_half() {
        let offer = |number| HalfOffer {
            gid: [0; 16],
            lid: 0,
            psn: 0,
            reads: 1,
            queue_pairs: vec![number],
            regions: Vec::new(),
        };
        let mut point = plan(&Space::default())[0].points[0].clone();
        point.direction = Direction::Loopback;
        // A: answers B, then asks itself and answers itself.
        let offers = [vec![offer(1), offer(2), offer(3)], vec![offer(4)]];
        let peers = counterparts(&point, &offers).unwrap();
        let numbers = |peers: &[HalfOffer]| -> Vec<u32> {
            peers.iter().map(|peer| peer.queue_pairs[0]).collect()
        };
        assert_eq!(numbers(&peers[0]), [4, 3, 2]);
        assert_eq!(numbers(&peers[1]), [1]);
        assert!(counterparts(&point, &[vec![offer(1)], vec![]]).is_err());
    }

    #[test]
    fn names_are_what_a_command_can_be_made_from() {
        let mut place = Place {
            devices: ["mlx5_0".into(), "mlx5_1".into()],
            ports: [1, 2],
            agent: None,
        };
        assert_eq!(place.to_string(), "mlx5_0,mlx5_1:2");
        place.agent = Some("10.0.0.2:7471".into());
        assert_eq!(place.to_string(), "mlx5_0,mlx5_1:2@10.0.0.2:7471");
    }
}
