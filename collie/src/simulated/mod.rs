//! Models of RDMA subsystems in virtual time, so that a search can be judged against causes that are known.
//!
//! A subsystem is a line rate, a packet rate, the rate of doorbells, a list of [`Mechanism`]s, counters and noise. The pressure of a mechanism moves the
//! counters it drives long before it fires; it fires when every one of its conditions holds. What hardware does not promise is not
//! promised here either: samples are noisy, a second is disturbed now and then, and some set-ups fail.

mod mechanism;
mod presets;
mod random;

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

pub use mechanism::{Effect, Mechanism};

use crate::space::{Direction, Point, Space};
use crate::subsystem::{Bound, Measurement, Probe, Sample, SetupFailed, Subsystem};

/// Seconds of a probe before any queue pair or region: launch, settle, sample.
const PROBE_S: f64 = 20.0;
/// Seconds to set up and take down a queue pair, and a region.
const QP_S: f64 = 0.005;
const REGION_S: f64 = 0.0005;
/// No probe takes longer: beyond this set-up is done in parallel.
const PROBE_S_MAX: f64 = 60.0;
/// Samples of a probe.
const SAMPLES: usize = 4;

/// How far from ideal the measurements are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Noise {
    /// Standard deviation of a counter's logarithm.
    pub counters: f64,
    /// Standard deviation of throughput's logarithm.
    pub throughput: f64,
    /// Probability that a second is disturbed: half the throughput, and a pause.
    pub disturbed: f64,
    /// Probability that a set-up fails.
    pub setup_fails: f64,
}

impl Default for Noise {
    fn default() -> Self {
        Noise {
            counters: 0.05,
            throughput: 0.02,
            disturbed: 0.005,
            setup_fails: 0.01,
        }
    }
}

/// The nature of a subsystem, shared by all the searches on it.
#[derive(Debug, Clone, PartialEq)]
pub struct Model {
    /// What reports call it.
    pub name: String,
    /// The workloads it runs.
    pub space: Space,
    /// Its port's rate, bits a second.
    pub line_bits_per_s: f64,
    /// Packets a second that it can process.
    pub packets_per_s: f64,
    /// Doorbells a second of one queue pair.
    pub doorbells_per_s: f64,
    /// The names of its counters.
    pub counters: Vec<String>,
    /// The counters' values, a second, while nothing is wrong.
    pub idle: Vec<f64>,
    /// What is wrong with it.
    pub mechanisms: Vec<Mechanism>,
    /// How noisy it is.
    pub noise: Noise,
}

/// A name that is not of a simulated subsystem.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the simulated subsystem '{0}' is unknown: give F, H or random:SEED")]
pub struct UnknownSubsystem(String);

impl Model {
    /// The subsystem of a name: `F` and `H` are those of the paper's Table 2, `random:SEED` is drawn from the grammar of conditions.
    ///
    /// # Errors
    /// [`UnknownSubsystem`] for any other name.
    pub fn named(name: &str) -> Result<Self, UnknownSubsystem> {
        match name {
            "F" | "f" => Ok(presets::f()),
            "H" | "h" => Ok(presets::h()),
            other => other
                .strip_prefix("random:")
                .and_then(|seed| seed.parse().ok())
                .map(random::model)
                .ok_or_else(|| UnknownSubsystem(name.to_owned())),
        }
    }

    /// The cause that a measurement at this point shows: the worst of those that fire.
    pub fn cause(&self, point: &Point) -> Option<usize> {
        (0..self.mechanisms.len())
            .filter(|&i| self.mechanisms[i].fires(point))
            .max_by(|&a, &b| {
                self.mechanisms[a]
                    .effect
                    .severity()
                    .total_cmp(&self.mechanisms[b].effect.severity())
            })
    }

    fn owed(&self, point: &Point) -> Bound {
        let bytes = point.mean_bytes();
        let packets: f64 = point
            .messages
            .iter()
            .map(|&size| f64::from(size.div_ceil(point.mtu)))
            .sum();
        let packets = packets / point.messages.len() as f64;
        let per_message_bits = 8.0 * bytes;
        let doorbells = self.doorbells_per_s * f64::from(point.qps) * f64::from(point.batch);
        let messages = (self.line_bits_per_s / per_message_bits)
            .min(self.packets_per_s / packets)
            .min(doorbells);
        Bound {
            bits_per_s: messages * per_message_bits,
            packets_per_s: messages * packets,
        }
    }

    fn seconds(&self, point: &Point) -> f64 {
        let qps = f64::from(point.qps);
        (PROBE_S + QP_S * qps + REGION_S * qps * f64::from(point.regions)).min(PROBE_S_MAX)
    }
}

/// A model being measured.
#[derive(Debug, Clone)]
pub struct Simulated<'m> {
    model: &'m Model,
    rng: Pcg64,
}

impl<'m> Simulated<'m> {
    /// Measures a model; the seed decides the noise.
    pub fn new(model: &'m Model, seed: u64) -> Self {
        Simulated {
            model,
            rng: Pcg64::seed_from_u64(seed),
        }
    }

    /// A factor whose logarithm is normal.
    fn noisy(&mut self, deviation: f64) -> f64 {
        // Box-Muller.
        let (u, v): (f64, f64) = (1.0 - self.rng.random::<f64>(), self.rng.random());
        (deviation * (-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * v).cos()).exp()
    }
}

impl Subsystem for Simulated<'_> {
    fn name(&self) -> String {
        self.model.name.clone()
    }

    fn space(&self) -> &Space {
        &self.model.space
    }

    fn counters(&self) -> &[String] {
        &self.model.counters
    }

    fn bound(&self, point: &Point) -> Bound {
        self.model.owed(point)
    }

    fn probe(&mut self, point: &Point) -> Probe {
        let model = self.model;
        let noise = model.noise;
        let seconds = model.seconds(point);
        if self.rng.random_bool(noise.setup_fails) {
            return Probe {
                seconds,
                outcome: Err(SetupFailed(
                    "a queue pair did not reach ready-to-send".to_owned(),
                )),
            };
        }
        let (mut counters, mut pause, mut throughput, mut sag) =
            (model.idle.clone(), 0.0f64, 1.0f64, 0.0f64);
        for mechanism in &model.mechanisms {
            let pressure = mechanism.pressure(point, &model.space);
            for &(counter, weight) in &mechanism.drives {
                counters[counter] += model.idle[counter] * weight * pressure;
            }
            if mechanism.fires(point) {
                pause = pause.max(mechanism.effect.pause);
                throughput = throughput.min(mechanism.effect.throughput);
            } else if mechanism.sags {
                sag = sag.max(0.12 * pressure);
            }
        }
        let owed = model.owed(point);
        let share = throughput.min(1.0 - sag);
        let mut end = |receives: bool, pauses: bool| -> Vec<Sample> {
            (0..SAMPLES)
                .map(|_| {
                    let disturbed = self.rng.random_bool(noise.disturbed);
                    let rate =
                        share * self.noisy(noise.throughput) * if disturbed { 0.5 } else { 1.0 };
                    let rate = if receives { rate.min(1.0) } else { 0.0 };
                    let paused = if pauses {
                        pause * self.noisy(noise.counters)
                    } else {
                        0.0
                    };
                    Sample {
                        bits_per_s: owed.bits_per_s * rate,
                        packets_per_s: owed.packets_per_s * rate,
                        pause_ratio: paused.max(if disturbed { 0.01 } else { 0.0 }).min(1.0),
                        loss_ratio: 0.0,
                        counters: counters
                            .iter()
                            .map(|value| value * self.noisy(noise.counters))
                            .collect(),
                    }
                })
                .collect()
        };
        // Host A receives and, when it cannot keep up, pauses B.
        let a = end(true, true);
        let b = end(point.direction == Direction::Bidirectional, false);
        Probe {
            seconds,
            outcome: Ok(Measurement { ends: [a, b] }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::monitor::Monitor;

    #[test]
    fn every_anomaly_can_be_met_and_is_seen_when_it_is() {
        for name in ["F", "H", "random:1", "random:2", "random:3"] {
            let model = Model::named(name).unwrap();
            let mut rng = Pcg64::seed_from_u64(7);
            for (i, mechanism) in model.mechanisms.iter().enumerate() {
                let found = (0..500)
                    .filter_map(|_| mechanism.region.sample(&model.space, &mut rng))
                    .find(|point| {
                        assert!(
                            mechanism.fires(point)
                                && (mechanism.pressure(point, &model.space) - 1.0).abs() < 1e-12
                        );
                        model.cause(point) == Some(i)
                    });
                let point = found.unwrap_or_else(|| {
                    panic!(
                        "{name}: {} is never the worst: {}",
                        mechanism.name, mechanism.region
                    )
                });
                let mut quiet = model.clone();
                quiet.noise = Noise {
                    counters: 0.0,
                    throughput: 0.0,
                    disturbed: 0.0,
                    setup_fails: 0.0,
                };
                let mut subsystem = Simulated::new(&quiet, 0);
                let verdict =
                    Monitor::default().judge(&subsystem.probe(&point), &subsystem.bound(&point));
                assert!(
                    verdict.symptom().is_some(),
                    "{name}: {} is not seen at {point:?}",
                    mechanism.name
                );
            }
        }
    }

    #[test]
    fn where_nothing_fires_the_verdict_is_clean_and_noise_does_not_change_it() {
        let model = Model::named("F").unwrap();
        let mut rng = Pcg64::seed_from_u64(11);
        let mut subsystem = Simulated::new(&model, 5);
        let (mut wrong, mut judged) = (0, 0);
        for _ in 0..5000 {
            let point = model.space.sample(&mut rng);
            let verdict =
                Monitor::default().judge(&subsystem.probe(&point), &subsystem.bound(&point));
            if verdict.confidence() > 0.0 {
                judged += 1;
                wrong += i32::from(verdict.symptom().is_some() != model.cause(&point).is_some());
            }
        }
        assert!(
            judged > 4800 && f64::from(wrong) / f64::from(judged) < 0.002,
            "{wrong} of {judged}"
        );
    }

    #[test]
    fn pressure_grows_towards_the_threshold() {
        let model = Model::named("F").unwrap();
        let seven = model.mechanisms.iter().find(|m| m.name == "#7").unwrap();
        let point = seven
            .region
            .sample(&model.space, &mut Pcg64::seed_from_u64(1))
            .unwrap();
        let mut last = 0.0;
        for regions in [1, 4, 16, 64] {
            let pressure = seven.pressure(
                &Point {
                    qps: 24,
                    regions,
                    ..point.clone()
                },
                &model.space,
            );
            assert!(pressure > last && pressure < 1.0);
            last = pressure;
        }
    }

    #[test]
    fn unknown_names_are_refused() {
        assert!(
            Model::named("G")
                .unwrap_err()
                .to_string()
                .contains("random:SEED")
        );
        assert!(Model::named("random:x").is_err());
    }
}
