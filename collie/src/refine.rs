//! Learning what known anomalies need, finely, while the search has nothing better to do.
//!
//! In turn for each anomaly, what promises most: settle a guess; try values of a category that were never seen; look for the anomaly beyond each
//! bound, all else at random, which shows bounds that are none and bounds that other settings make up for; halve the doubt of a bound; try a
//! random workload of the conditions.

use rand::RngExt;

use crate::case::{Case, Sight, Tried};
use crate::mfs::{Edge, Factor};
use crate::region::{Condition, Region};
use crate::search::Search;
use crate::session::{OutOfTime, Purpose};
use crate::space::{Category, Choice, Quantity};

/// Workloads beyond a bound without the anomaly, before it is taken for one.
const BEYOND_TRIALS: u32 = 3;
/// Attempts to see a value of a category, or to halve a doubt, that say nothing.
const ATTEMPTS_MAX: u32 = 3;
/// Random workloads of the conditions that must show the anomaly before bounds are looked at.
const CHECKS: u32 = 3;
/// A bound is in the right place once it is known to the first factor, and fine enough at the second.
const COARSE: f64 = 1.5;
const FINE: f64 = 1.02;

/// One thing to try.
enum Step {
    Settle,
    Value(Category, Choice),
    Beyond(Quantity, bool, Edge),
    Halve(Quantity, bool, Edge),
    Check,
}

impl Search<'_, '_> {
    /// One step for the anomaly that had the fewest. False if there is none.
    pub(crate) fn refine(&mut self) -> Result<bool, OutOfTime> {
        let Some(place) = (0..self.known.len()).min_by_key(|&i| self.known[i].refined) else {
            return Ok(false);
        };
        let mut case = self.known.remove(place);
        let before = self.session.records().len();
        self.purpose = Purpose::Refine;
        let done = self.refine_case(&mut case);
        self.purpose = Purpose::Extract;
        let probes = self.session.records().len() - before;
        case.mfs.probes += probes;
        // A step that found nothing to measure counts too, or it would be taken for ever.
        case.refined += probes.max(1);
        self.known.insert(place, case);
        done.map(|()| true)
    }

    fn refine_case(&mut self, case: &mut Case) -> Result<(), OutOfTime> {
        self.refit(case);
        match self.next_step(case) {
            Step::Settle => {
                let guessed = case.guessed.clone();
                if let Some((shown, without)) = self.nearest(case, &guessed) {
                    self.separate(case, shown, without)?;
                }
            }
            Step::Value(category, value) => {
                *case.tried.entry(Tried::Value(category, value)).or_default() += 1;
                let mut region = case.mfs.region(self.session.space());
                for condition in &mut region.conditions {
                    if let Condition::Among {
                        category: of,
                        values,
                    } = condition
                        && *of == category
                    {
                        *values = vec![value];
                    }
                }
                if let Some(point) = self.draw(case, &region) {
                    self.try_point(case, &point)?;
                }
            }
            Step::Beyond(quantity, below, edge) => {
                *case
                    .tried
                    .entry(Tried::Beyond(quantity, below))
                    .or_default() += 1;
                let region = self.beyond(case, quantity, below, edge);
                if let Some(point) = self.draw(case, &region)
                    && self.try_point(case, &point)? == Some(Sight::Shows)
                {
                    // The bound was none, or not there: what is found now needs trying as much.
                    case.tried.remove(&Tried::Beyond(quantity, below));
                }
            }
            Step::Halve(quantity, below, edge) => {
                *case
                    .tried
                    .entry(Tried::Halving(quantity, below))
                    .or_default() += 1;
                let target = edge.target();
                let mut region = case
                    .mfs
                    .region_without(self.session.space(), quantity, below);
                region.conditions.push(near(quantity, target, edge));
                if let Some(point) = self.draw(case, &region)
                    && matches!(
                        self.try_point(case, &point)?,
                        Some(Sight::Shows | Sight::Absent)
                    )
                {
                    case.tried.remove(&Tried::Halving(quantity, below));
                }
            }
            Step::Check => {
                *case.tried.entry(Tried::Check).or_default() += 1;
                let region = case.mfs.region(self.session.space());
                if let Some(point) = self.draw(case, &region)
                    && self.try_point(case, &point)? == Some(Sight::Absent)
                {
                    case.tried.remove(&Tried::Check);
                    let shown = self.nearest_shown(case, &point);
                    self.separate(case, shown, point)?;
                }
            }
        }
        self.refit(case);
        Ok(())
    }

    fn next_step(&mut self, case: &Case) -> Step {
        let tried = |what: Tried| case.tried.get(&what).copied().unwrap_or(0);
        if !case.guessed.is_empty() && self.rng.random_bool(0.8) {
            return Step::Settle;
        }
        // What was met first was learnt in haste: conditions may be missing.
        if tried(Tried::Check) < CHECKS {
            return Step::Check;
        }
        let mut edges: Vec<(Quantity, bool, Edge)> = Vec::new();
        for factor in &case.mfs.factors {
            match factor {
                Factor::Among {
                    category,
                    anomalous,
                    clean,
                } => {
                    let unseen = self
                        .session
                        .space()
                        .choices(*category)
                        .into_iter()
                        .filter(|value| !anomalous.contains(value) && !clean.contains(value))
                        .find(|value| tried(Tried::Value(*category, *value)) < ATTEMPTS_MAX);
                    if let Some(value) = unseen {
                        return Step::Value(*category, value);
                    }
                }
                Factor::Within {
                    quantity,
                    lower,
                    upper,
                } => {
                    edges.extend(lower.map(|edge| (*quantity, true, edge)));
                    edges.extend(upper.map(|edge| (*quantity, false, edge)));
                }
            }
        }
        let open = |(quantity, below, edge): &&(Quantity, bool, Edge)| {
            let apart = match quantity {
                Quantity::Axis(_) => (edge.inside - edge.outside).abs() > 1.5,
                _ => true,
            };
            apart && tried(Tried::Halving(*quantity, *below)) < ATTEMPTS_MAX
        };
        let coarsest = edges
            .iter()
            .filter(open)
            .max_by(|a, b| a.2.doubt().total_cmp(&b.2.doubt()))
            .copied();
        // First what may be off by much, then whether the bounds are ones at all, then the rest.
        if let Some((quantity, below, edge)) = coarsest
            && edge.doubt() > COARSE.ln()
        {
            return Step::Halve(quantity, below, edge);
        }
        let least_tried = edges
            .iter()
            .min_by_key(|(quantity, below, _)| tried(Tried::Beyond(*quantity, *below)));
        if let Some(&(quantity, below, edge)) = least_tried
            && tried(Tried::Beyond(quantity, below)) < BEYOND_TRIALS
        {
            return Step::Beyond(quantity, below, edge);
        }
        match coarsest {
            Some((quantity, below, edge))
                if edge.doubt() > FINE.ln() && self.rng.random_bool(0.8) =>
            {
                Step::Halve(quantity, below, edge)
            }
            _ => Step::Check,
        }
    }

    /// The workloads that fail one bound only: half of the time not by far.
    fn beyond(&mut self, case: &Case, quantity: Quantity, below: bool, edge: Edge) -> Region {
        let mut region = case
            .mfs
            .region_without(self.session.space(), quantity, below);
        let factor = edge.inside / edge.outside;
        let near = self.rng.random_bool(0.5);
        let far = edge.outside
            / factor
                .max(1.0 / factor)
                .powf(if below { 1.0 } else { -1.0 });
        let far = if below {
            far.min(edge.outside / 4.0)
        } else {
            far.max(edge.outside * 4.0)
        };
        let (at_least, at_most) = match (below, near) {
            (true, true) => (Some(far), Some(edge.outside)),
            (true, false) => (None, Some(edge.outside)),
            (false, true) => (Some(edge.outside), Some(far)),
            (false, false) => (Some(edge.outside), None),
        };
        region.conditions.push(Condition::Within {
            quantity,
            at_least,
            at_most,
        });
        region
    }
}

/// Values about a target, within an edge.
fn near(quantity: Quantity, target: f64, edge: Edge) -> Condition {
    let (low, high) = (edge.inside.min(edge.outside), edge.inside.max(edge.outside));
    let (at_least, at_most) = match quantity {
        Quantity::Axis(_) => {
            let whole = target
                .round()
                .clamp((low + 1.0).floor(), (high - 1.0).ceil());
            (whole, whole)
        }
        _ => {
            let quarter = (high / low).powf(0.25);
            (target / quarter, target * quarter)
        }
    };
    Condition::Within {
        quantity,
        at_least: Some(at_least),
        at_most: Some(at_most),
    }
}
