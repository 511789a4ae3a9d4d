//! The verdict on a measurement: clean, anomalous, or invalid.
//!
//! An anomaly (Collie, section 4) is traffic that makes an end pause its peer for more than 0.1 % of the time though nothing else is on the network, or whose bits/s
//! and packets/s are both more than 20 % below what the hardware owes it. On a fabric without flow control pauses cannot happen: there the
//! share of lost and repeated packets counts, over what a clean link shows.
//!
//! The median of the samples decides, so that one disturbed second does not; the samples that agree with it are the verdict's confidence.

use serde::{Deserialize, Serialize};

use crate::subsystem::{Bound, Measurement, Probe, Sample};

/// What is wrong with the traffic, each with its median.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Symptom {
    /// Share of the time spent in pause, where that is too much.
    pub pause: Option<f64>,
    /// Throughput as a share of what is owed, where that is too little.
    pub throughput: Option<f64>,
    /// Share of packets lost, where that is too much.
    pub loss: Option<f64>,
}

impl Symptom {
    /// Whether two symptoms have a kind in common.
    pub fn resembles(&self, other: &Symptom) -> bool {
        (self.pause.is_some() && other.pause.is_some())
            || (self.throughput.is_some() && other.throughput.is_some())
            || (self.loss.is_some() && other.loss.is_some())
    }
}

impl std::fmt::Display for Symptom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut parts = Vec::new();
        if let Some(pause) = self.pause {
            parts.push(format!("in pause {:.1} % of the time", pause * 100.0));
        }
        if let Some(throughput) = self.throughput {
            parts.push(format!(
                "throughput {:.0} % of what the hardware owes",
                throughput * 100.0
            ));
        }
        if let Some(loss) = self.loss {
            parts.push(format!("{:.2} % of packets lost or repeated", loss * 100.0));
        }
        f.write_str(&parts.join(", "))
    }
}

/// What a measurement says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Healthy.
    Clean {
        /// Share of samples that say so.
        confidence: f64,
    },
    /// Not healthy.
    Anomalous {
        /// In what way.
        symptom: Symptom,
        /// Share of samples that say so.
        confidence: f64,
    },
    /// Nothing can be said.
    Invalid {
        /// Why.
        reason: String,
    },
}

impl Verdict {
    /// The symptom, where there is one.
    pub fn symptom(&self) -> Option<&Symptom> {
        match self {
            Verdict::Anomalous { symptom, .. } => Some(symptom),
            _ => None,
        }
    }

    /// Whether the workload was found healthy.
    pub fn is_clean(&self) -> bool {
        matches!(self, Verdict::Clean { .. })
    }

    /// Share of samples that agree; nothing for an invalid measurement.
    pub fn confidence(&self) -> f64 {
        match self {
            Verdict::Clean { confidence } | Verdict::Anomalous { confidence, .. } => *confidence,
            Verdict::Invalid { .. } => 0.0,
        }
    }
}

/// The thresholds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Monitor {
    /// Pause beyond this share of the time is too much.
    pub pause_max: f64,
    /// Throughput below this share of the bound is too little.
    pub throughput_min: f64,
    /// Loss beyond this share of packets is too much. None where the fabric has flow control: there it does not lose.
    pub loss_max: Option<f64>,
}

impl Default for Monitor {
    /// The paper's definition.
    fn default() -> Self {
        Monitor {
            pause_max: 0.001,
            throughput_min: 0.8,
            loss_max: None,
        }
    }
}

impl Monitor {
    /// For a fabric without flow control, whose clean traffic loses this share of its packets: ten times that is too much, and so is
    /// a thousandth where nothing is lost.
    pub fn lossy(clean_loss: f64) -> Self {
        Monitor {
            loss_max: Some((10.0 * clean_loss).max(0.001)),
            ..Monitor::default()
        }
    }

    /// Judges a probe.
    pub fn judge(&self, probe: &Probe, bound: &Bound) -> Verdict {
        match &probe.outcome {
            Err(error) => Verdict::Invalid {
                reason: error.to_string(),
            },
            Ok(measurement) => self.judge_measurement(measurement, bound),
        }
    }

    fn judge_measurement(&self, measurement: &Measurement, bound: &Bound) -> Verdict {
        let ends: Vec<&Vec<Sample>> = measurement
            .ends
            .iter()
            .filter(|end| !end.is_empty())
            .collect();
        if ends
            .iter()
            .all(|end| end.iter().all(|sample| sample.packets_per_s == 0.0))
        {
            return Verdict::Invalid {
                reason: "no traffic arrived at either end".to_owned(),
            };
        }
        let share = |s: &Sample| {
            (s.bits_per_s / bound.bits_per_s).max(s.packets_per_s / bound.packets_per_s)
        };
        let (mut symptom, mut agreeing) = (
            Symptom {
                pause: None,
                throughput: None,
                loss: None,
            },
            Vec::new(),
        );
        for end in ends {
            // An end that only sends receives nothing: it can pause, but owes no throughput.
            let receives = end.iter().any(|sample| sample.packets_per_s > 0.0);
            let pause = median(end.iter().map(|s| s.pause_ratio));
            let loss = median(end.iter().map(|s| s.loss_ratio));
            let throughput = median(end.iter().map(share));
            let too_slow = |s: f64| receives && s < self.throughput_min;
            let too_lossy = |s: f64| self.loss_max.is_some_and(|most| s > most);
            let bad = (
                pause > self.pause_max,
                too_slow(throughput),
                too_lossy(loss),
            );
            if bad.0 {
                symptom.pause = Some(symptom.pause.unwrap_or(0.0).max(pause));
            }
            if bad.1 {
                symptom.throughput = Some(symptom.throughput.unwrap_or(1.0).min(throughput));
            }
            if bad.2 {
                symptom.loss = Some(symptom.loss.unwrap_or(0.0).max(loss));
            }
            let is_bad = |s: &Sample| {
                s.pause_ratio > self.pause_max || too_slow(share(s)) || too_lossy(s.loss_ratio)
            };
            let anomalous = bad.0 || bad.1 || bad.2;
            let alike = end.iter().filter(|s| is_bad(s) == anomalous).count();
            agreeing.push((anomalous, alike as f64 / end.len() as f64));
        }
        let of = |anomalous: bool| {
            agreeing
                .iter()
                .filter(move |(bad, _)| *bad == anomalous)
                .map(|(_, alike)| *alike)
        };
        if agreeing.iter().any(|(bad, _)| *bad) {
            // Anomalous where one end is: the surest end's confidence. Clean where both are: the less sure one's.
            Verdict::Anomalous {
                symptom,
                confidence: of(true).fold(0.0, f64::max),
            }
        } else {
            Verdict::Clean {
                confidence: of(false).fold(1.0, f64::min),
            }
        }
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[middle],
        _ => (values[middle - 1] + values[middle]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subsystem::SetupFailed;

    const BOUND: Bound = Bound {
        bits_per_s: 100e9,
        packets_per_s: 10e6,
    };

    fn sample(share: f64, pause_ratio: f64) -> Sample {
        Sample {
            bits_per_s: share * BOUND.bits_per_s,
            packets_per_s: share * BOUND.packets_per_s,
            pause_ratio,
            loss_ratio: 0.0,
            counters: vec![],
        }
    }

    fn judge(a: Vec<Sample>, b: Vec<Sample>) -> Verdict {
        Monitor::default().judge(
            &Probe {
                seconds: 20.0,
                outcome: Ok(Measurement { ends: [a, b] }),
            },
            &BOUND,
        )
    }

    #[test]
    fn pause_and_throughput_each_make_an_anomaly() {
        let verdict = judge(vec![sample(0.95, 0.02); 4], vec![]);
        assert_eq!(verdict.symptom().unwrap().pause, Some(0.02));
        let verdict = judge(vec![sample(0.7, 0.0); 4], vec![]);
        assert_eq!(verdict.symptom().unwrap().throughput, Some(0.7));
        assert!(judge(vec![sample(0.81, 0.0009); 4], vec![]).is_clean());
    }

    #[test]
    fn bits_or_packets_at_their_bound_is_healthy() {
        let packets_only = Sample {
            bits_per_s: 1e9,
            ..sample(0.9, 0.0)
        };
        assert!(judge(vec![packets_only; 4], vec![]).is_clean());
    }

    #[test]
    fn one_disturbed_second_does_not_decide_but_lowers_the_confidence() {
        let verdict = judge(
            vec![
                sample(0.9, 0.0),
                sample(0.9, 0.0),
                sample(0.3, 0.1),
                sample(0.9, 0.0),
            ],
            vec![],
        );
        assert_eq!(verdict, Verdict::Clean { confidence: 0.75 });
    }

    #[test]
    fn either_end_can_be_the_sick_one_and_a_sender_owes_nothing() {
        let verdict = judge(vec![sample(0.95, 0.0); 4], vec![sample(0.4, 0.0); 4]);
        assert_eq!(verdict.symptom().unwrap().throughput, Some(0.4));
        assert!(judge(vec![sample(0.95, 0.0); 4], vec![sample(0.0, 0.0); 4]).is_clean());
    }

    #[test]
    fn a_failed_set_up_and_silence_are_invalid() {
        let failed = Probe {
            seconds: 5.0,
            outcome: Err(SetupFailed("out of memory".into())),
        };
        assert!(
            matches!(Monitor::default().judge(&failed, &BOUND), Verdict::Invalid { reason } if reason.contains("out of memory"))
        );
        let silent = judge(vec![sample(0.0, 0.0); 4], vec![sample(0.0, 0.0); 4]);
        assert!(matches!(silent, Verdict::Invalid { reason } if reason.contains("no traffic")));
    }

    #[test]
    fn a_lossy_fabric_is_judged_by_its_losses() {
        let lossy = Sample {
            loss_ratio: 0.02,
            ..sample(0.95, 0.0)
        };
        let probe = Probe {
            seconds: 20.0,
            outcome: Ok(Measurement {
                ends: [vec![lossy; 4], vec![]],
            }),
        };
        assert!(Monitor::default().judge(&probe, &BOUND).is_clean());
        assert_eq!(
            Monitor::lossy(0.0001)
                .judge(&probe, &BOUND)
                .symptom()
                .unwrap()
                .loss,
            Some(0.02)
        );
        assert!(Monitor::lossy(0.01).judge(&probe, &BOUND).is_clean());
    }
}
