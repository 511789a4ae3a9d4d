//! The anomalies of a subsystem as a file, and what one asks of it: does a workload meet one, what must a design avoid, what changed.

use std::fs;
use std::path::{Path, PathBuf};

use rand::SeedableRng;
use rand_pcg::Pcg64;
use serde::{Deserialize, Serialize};

use crate::mfs::{Factor, Mfs};
use crate::region::{Condition, Region};
use crate::space::{Choice, Point, Quantity, Space};

/// The version of the file's format.
const FORMAT: u32 = 1;
/// Random workloads by which two parts of a space are compared.
const COMPARED: usize = 200;

/// What is known of a subsystem.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KnownAnomalies {
    format: u32,
    /// The subsystem: adapter, firmware, hosts, as whoever searched named it.
    pub subsystem: String,
    /// The workloads that were searched. Of others nothing is known.
    pub space: Space,
    /// The names of the counters of the signatures.
    pub counters: Vec<String>,
    /// The anomalies.
    pub anomalies: Vec<Mfs>,
}

/// Why a file of anomalies cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KnownError {
    /// It cannot be read or written.
    #[error("{}: {error}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The fault.
        error: std::io::Error,
    },
    /// It is not such a file.
    #[error("{}: not a file of known anomalies: {error}", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// The fault, with its line.
        error: serde_json::Error,
    },
    /// A later version wrote it.
    #[error("{}: format {format}, but this version reads format {FORMAT}: search again, or use the version that wrote it", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: u32,
    },
}

/// An anomaly that a workload meets.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Met {
    /// Its place in the file, from 1.
    pub anomaly: usize,
    /// Its conditions, in words.
    pub conditions: String,
    /// What the workload will suffer.
    pub symptom: String,
    /// Each of these alone avoids it.
    pub ways_out: Vec<String>,
}

/// An anomaly that workloads of a space can meet.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Reachable {
    /// Its place in the file, from 1.
    pub anomaly: usize,
    /// What a design within the space must do to meet it: the conditions that the space does not fulfil by itself.
    pub avoid: String,
    /// What it causes.
    pub symptom: String,
}

/// What changed between two searches.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// Places in the new file of anomalies that the old one does not have.
    pub appeared: Vec<usize>,
    /// Places in the old file of anomalies that the new one does not have.
    pub vanished: Vec<usize>,
    /// Places in the old and the new file of the same anomaly.
    pub remained: Vec<(usize, usize)>,
}

impl KnownAnomalies {
    /// The outcome of a search.
    pub fn new(
        subsystem: String,
        space: Space,
        counters: Vec<String>,
        anomalies: Vec<Mfs>,
    ) -> Self {
        KnownAnomalies {
            format: FORMAT,
            subsystem,
            space,
            counters,
            anomalies,
        }
    }

    /// Reads a file.
    ///
    /// # Errors
    /// [`KnownError`] names the file, and the line where the content is at fault.
    pub fn load(path: &Path) -> Result<Self, KnownError> {
        let text = fs::read_to_string(path).map_err(|error| KnownError::File {
            path: path.to_owned(),
            error,
        })?;
        let known: KnownAnomalies =
            serde_json::from_str(&text).map_err(|error| KnownError::Content {
                path: path.to_owned(),
                error,
            })?;
        if known.format != FORMAT {
            return Err(KnownError::Format {
                path: path.to_owned(),
                format: known.format,
            });
        }
        Ok(known)
    }

    /// Writes a file: whole, or not at all.
    ///
    /// # Errors
    /// [`KnownError::File`] names it.
    pub fn save(&self, path: &Path) -> Result<(), KnownError> {
        let text = serde_json::to_string_pretty(self).expect("anomalies are plain data");
        let beside = path.with_extension("tmp");
        let written = fs::write(&beside, text + "\n").and_then(|()| fs::rename(&beside, path));
        written.map_err(|error| KnownError::File {
            path: path.to_owned(),
            error,
        })
    }

    /// The anomalies that a workload meets.
    pub fn met_by(&self, point: &Point) -> Vec<Met> {
        let numbered = self.anomalies.iter().enumerate();
        numbered
            .filter(|(_, mfs)| mfs.region(&self.space).contains(point))
            .map(|(place, mfs)| Met {
                anomaly: place + 1,
                conditions: mfs.region(&self.space).to_string(),
                symptom: mfs.symptom.to_string(),
                ways_out: mfs.factors.iter().map(way_out).collect(),
            })
            .collect()
    }

    /// The anomalies that workloads of a space can meet.
    pub fn reachable_in(&self, space: &Space) -> Vec<Reachable> {
        let mut rng = Pcg64::seed_from_u64(0);
        let usual: Vec<Point> = (0..COMPARED).map(|_| space.sample(&mut rng)).collect();
        let numbered = self.anomalies.iter().enumerate();
        numbered
            .filter_map(|(place, mfs)| {
                let region = mfs.region(&self.space);
                region.sample(space, &mut rng)?;
                let chosen =
                    |condition: &Condition| !usual.iter().all(|point| condition.holds(point));
                let conditions: Vec<Condition> = region
                    .conditions
                    .into_iter()
                    .filter(|c| chosen(c))
                    .collect();
                Some(Reachable {
                    anomaly: place + 1,
                    avoid: Region { conditions }.to_string(),
                    symptom: mfs.symptom.to_string(),
                })
            })
            .collect()
    }

    /// What changed from an older search of the same space.
    pub fn since(&self, old: &KnownAnomalies) -> Difference {
        let mut rng = Pcg64::seed_from_u64(0);
        // The same anomaly: most of what either speaks of, the other does.
        let mut covers = |a: &Mfs, in_a: &Space, b: &Mfs, in_b: &Space| {
            let (region, other) = (a.region(in_a), b.region(in_b));
            let points: Vec<Point> = (0..COMPARED)
                .filter_map(|_| other.sample(in_b, &mut rng))
                .collect();
            2 * points.iter().filter(|point| region.contains(point)).count() > points.len()
        };
        let mut remained = Vec::new();
        for (i, before) in old.anomalies.iter().enumerate() {
            for (j, now) in self.anomalies.iter().enumerate() {
                let same = before.symptom.resembles(&now.symptom)
                    && covers(before, &old.space, now, &self.space)
                    && covers(now, &self.space, before, &old.space);
                if same && !remained.iter().any(|&(a, b)| a == i + 1 || b == j + 1) {
                    remained.push((i + 1, j + 1));
                }
            }
        }
        let appeared = (1..=self.anomalies.len())
            .filter(|j| !remained.iter().any(|(_, now)| now == j))
            .collect();
        let vanished = (1..=old.anomalies.len())
            .filter(|i| !remained.iter().any(|(before, _)| before == i))
            .collect();
        Difference {
            appeared,
            vanished,
            remained,
        }
    }
}

/// A change that breaks a condition, to a value that was measured clean.
fn way_out(factor: &Factor) -> String {
    match factor {
        Factor::Among {
            category, clean, ..
        } => {
            let clean: Vec<String> = clean.iter().map(Choice::to_string).collect();
            format!("set {category} to {}", clean.join(" or "))
        }
        Factor::Within {
            quantity,
            lower,
            upper,
        } => {
            let bound = |at_least, at_most| {
                Condition::Within {
                    quantity: *quantity,
                    at_least,
                    at_most,
                }
                .to_string()
            };
            let whole = |value: f64, up: bool| match quantity {
                Quantity::Axis(_) if up => value.ceil(),
                Quantity::Axis(_) => value.floor(),
                _ => value,
            };
            let below = lower.map(|edge| bound(None, Some(whole(edge.outside, false))));
            let above = upper.map(|edge| bound(Some(whole(edge.outside, true)), None));
            format!(
                "keep {}",
                below
                    .into_iter()
                    .chain(above)
                    .collect::<Vec<_>>()
                    .join(", or ")
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mfs::Edge;
    use crate::monitor::Symptom;
    use crate::space::{Axis, Category, Operation, Setting};

    fn mfs(batch: f64) -> Mfs {
        let space = Space::default();
        let mut rng = Pcg64::seed_from_u64(9);
        let anchor = space.with(&space.sample(&mut rng), Setting::Axis(Axis::Batch, 128));
        let anchor = space.with(
            &anchor,
            Setting::Choice(Category::Operation, Choice::Operation(Operation::RcWrite)),
        );
        Mfs {
            factors: vec![
                Factor::Among {
                    category: Category::Operation,
                    anomalous: vec![Choice::Operation(Operation::RcWrite)],
                    clean: Operation::ALL
                        .iter()
                        .filter(|o| **o != Operation::RcWrite)
                        .map(|o| Choice::Operation(*o))
                        .collect(),
                },
                Factor::Within {
                    quantity: Quantity::Axis(Axis::Batch),
                    lower: Some(Edge {
                        inside: batch,
                        outside: batch - 1.0,
                        likely: None,
                    }),
                    upper: None,
                },
            ],
            anchor,
            symptom: Symptom {
                pause: Some(0.2),
                throughput: None,
                loss: None,
            },
            signature: vec![1.0],
            probes: 10,
        }
    }

    fn known(batches: &[f64]) -> KnownAnomalies {
        let anomalies = batches.iter().map(|&batch| mfs(batch)).collect();
        KnownAnomalies::new("test".into(), Space::default(), vec!["c".into()], anomalies)
    }

    #[test]
    fn a_workload_that_meets_one_is_told_every_way_out() {
        let known = known(&[64.0]);
        let met = known.met_by(&known.anomalies[0].anchor);
        assert_eq!(met.len(), 1);
        assert_eq!(met[0].ways_out.len(), 2);
        assert_eq!(met[0].ways_out[1], "keep doorbell batch at most 63");
        let space = Space::default();
        let small = space.with(&known.anomalies[0].anchor, Setting::Axis(Axis::Batch, 63));
        assert_eq!(known.met_by(&small), []);
    }

    #[test]
    fn a_design_is_told_what_it_can_still_do_wrong() {
        let known = known(&[64.0]);
        let writes = Space {
            operation: vec![Operation::RcWrite],
            ..Space::default()
        };
        let reachable = known.reachable_in(&writes);
        assert_eq!(reachable[0].avoid, "doorbell batch at least 64");
        let sends = Space {
            operation: vec![Operation::RcSend],
            ..Space::default()
        };
        assert_eq!(known.reachable_in(&sends), []);
    }

    #[test]
    fn what_appeared_and_what_vanished() {
        let difference = known(&[64.0, 4.0]).since(&known(&[66.0, 120.0]));
        assert_eq!(
            difference,
            Difference {
                appeared: vec![2],
                vanished: vec![2],
                remained: vec![(1, 1)]
            }
        );
    }

    #[test]
    fn a_file_comes_back_as_it_was_and_strangers_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("anomalies.json");
        known(&[64.0]).save(&path).unwrap();
        assert_eq!(KnownAnomalies::load(&path).unwrap(), known(&[64.0]));
        fs::write(&path, "{\"format\": 1}").unwrap();
        assert!(
            KnownAnomalies::load(&path)
                .unwrap_err()
                .to_string()
                .contains("anomalies.json: not a file of known anomalies")
        );
        let text = serde_json::to_string(&KnownAnomalies {
            format: 2,
            ..known(&[])
        })
        .unwrap();
        fs::write(&path, text).unwrap();
        assert!(
            KnownAnomalies::load(&path)
                .unwrap_err()
                .to_string()
                .contains("format 2")
        );
    }
}
