//! From measured workloads to conditions: the plainest conjunction that admits every workload showing an anomaly and none that does not.
//!
//! Pure: it sees points and knows nothing of probes. A workload without the anomaly (a *counter-example*) must be shut out by at least one condition. One that only a single setting tells from
//! the workloads with it forces a condition on that setting; one that several settings tell apart is shut out by whatever the
//! others forced, and where that does not suffice the condition is a guess, and said to be one. Where no bound on a single number can shut a counter-example out, but two
//! numbers make up for each other, the condition is on their product or ratio. So a bound that was first seen on one number turns into one on a product as
//! soon as a workload beyond it shows the anomaly all the same.

use crate::mfs::{Edge, Factor};
use crate::space::{Axis, Category, Choice, Point, Quantity, Space};

/// Conditions of one anomaly, and products and ratios among them, at most: with enough of them anything can be told from anything.
const CONDITIONS_MAX: usize = 9;
const DERIVED_MAX: usize = 2;

/// What the conditions of a fit rest on.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Fit {
    /// The conditions.
    pub factors: Vec<Factor>,
    /// Places of counter-examples that nothing forced shuts out: measuring between one of them and a workload with the anomaly says what does.
    pub guessed: Vec<usize>,
}

/// A condition that could be set: on a category, or on one side of a quantity.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Candidate {
    Category(Category),
    Bound {
        quantity: Quantity,
        /// The bound is a least value.
        below: bool,
        /// The outermost value that shows the anomaly.
        inside: f64,
    },
}

impl Candidate {
    /// The distance by which a point fails it on a log scale, or None where it holds.
    fn fails_by(&self, point: &Point, shown: &[&Point]) -> Option<f64> {
        match *self {
            Candidate::Category(category) => {
                let value = category.of(point);
                (!shown.iter().any(|other| category.of(other) == value)).then_some(1.0)
            }
            Candidate::Bound {
                quantity,
                below,
                inside,
            } => {
                if !quantity.applies(point) {
                    return Some(f64::INFINITY);
                }
                let value = quantity.of(point);
                let beyond = if below {
                    inside / value
                } else {
                    value / inside
                };
                (beyond > 1.0 + 1e-9).then(|| beyond.ln())
            }
        }
    }
}

/// A set of places, as bits.
#[derive(Debug, Clone, PartialEq)]
struct Places(Vec<u64>);

impl Places {
    fn none(count: usize) -> Self {
        Places(vec![0; count.div_ceil(64)])
    }
    fn insert(&mut self, place: usize) {
        self.0[place / 64] |= 1 << (place % 64);
    }
    fn contains(&self, place: usize) -> bool {
        self.0[place / 64] >> (place % 64) & 1 == 1
    }
    fn union(&mut self, other: &Places) {
        self.0.iter_mut().zip(&other.0).for_each(|(a, b)| *a |= b);
    }
    /// How many of these are not among the others.
    fn beyond(&self, others: &Places) -> u32 {
        let words = self.0.iter().zip(&others.0);
        words.map(|(a, b)| (a & !b).count_ones()).sum()
    }
}

/// The plainest conditions for workloads that show an anomaly and some that do not. None if no conjunction tells them apart: then they are not of one
/// cause, or one of them was misjudged.
///
/// `shown` holds at least one point.
pub(crate) fn fit(shown: &[&Point], without: &[&Point], space: &Space) -> Option<Fit> {
    let simple = simple_candidates(shown);
    let shut: Vec<Places> = simple.iter().map(|c| shut_out(c, shown, without)).collect();
    let mut chosen: Vec<(Candidate, Places)> = Vec::new();
    let mut covered = Places::none(without.len());
    // What no simple condition shuts out needs a product or a ratio.
    let hard: Vec<usize> = (0..without.len())
        .filter(|&n| !shut.iter().any(|places| places.contains(n)))
        .collect();
    if !hard.is_empty() {
        let derived: Vec<(Candidate, Places)> = derived_candidates(shown, space)
            .into_iter()
            .map(|candidate| (candidate, shut_out(&candidate, shown, without)))
            .collect();
        while let Some(&first) = hard.iter().find(|&&n| !covered.contains(n)) {
            let of_hard = |places: &Places| {
                hard.iter()
                    .filter(|&&n| places.contains(n) && !covered.contains(n))
                    .count()
            };
            let best = derived
                .iter()
                .filter(|(_, places)| places.contains(first))
                .max_by_key(|(_, places)| (of_hard(places), places.beyond(&covered)))?;
            covered.union(&best.1);
            chosen.push(best.clone());
            if chosen.len() > DERIVED_MAX {
                return None;
            }
        }
    }
    // What one setting alone tells apart forces a condition on it.
    let excluders =
        |n: usize| -> Vec<usize> { (0..simple.len()).filter(|&c| shut[c].contains(n)).collect() };
    for n in 0..without.len() {
        if covered.contains(n) {
            continue;
        }
        if let [only] = excluders(n)[..] {
            covered.union(&shut[only]);
            chosen.push((simple[only], shut[only].clone()));
        }
    }
    // The rest is a guess: what shuts out the most, taking first those of which the fewest conditions can be guilty.
    let mut guessed = Vec::new();
    while let Some(n) = (0..without.len())
        .filter(|&n| !covered.contains(n))
        .min_by_key(|&n| excluders(n).len())
    {
        guessed.extend((0..without.len()).filter(|&m| !covered.contains(m)));
        let best = excluders(n)
            .into_iter()
            .max_by_key(|&c| shut[c].beyond(&covered))
            .expect("a simple condition shuts it out");
        covered.union(&shut[best]);
        chosen.push((simple[best], shut[best].clone()));
    }
    guessed.sort_unstable();
    guessed.dedup();
    prune(&mut chosen, without.len());
    if chosen.len() > CONDITIONS_MAX {
        return None;
    }
    Some(Fit {
        factors: factors(&chosen, shown, without),
        guessed,
    })
}

fn simple_candidates(shown: &[&Point]) -> Vec<Candidate> {
    let axes = Axis::ALL.map(Quantity::Axis);
    let bounds = axes
        .into_iter()
        .flat_map(|quantity| bounds(quantity, shown));
    Category::ALL
        .map(Candidate::Category)
        .into_iter()
        .chain(bounds)
        .collect()
}

/// Products and ratios of two axes. How many sizes a sequence has makes up for nothing.
fn derived_candidates(shown: &[&Point], space: &Space) -> Vec<Candidate> {
    let spread = |axis: &Axis| {
        let (low, high) = space.range(*axis);
        *axis != Axis::Messages && low < high
    };
    let axes: Vec<Axis> = Axis::ALL.into_iter().filter(spread).collect();
    let pairs = axes
        .iter()
        .enumerate()
        .flat_map(|(i, &a)| axes[i + 1..].iter().map(move |&b| (a, b)));
    pairs
        .flat_map(|(a, b)| [Quantity::Product(a, b), Quantity::Ratio(a, b)])
        .flat_map(|quantity| bounds(quantity, shown))
        .collect()
}

/// The tightest bounds on both sides that admit every point shown; none where the traffic of one of them does not depend on the quantity.
fn bounds(quantity: Quantity, shown: &[&Point]) -> Vec<Candidate> {
    if !shown.iter().all(|point| quantity.applies(point)) {
        return Vec::new();
    }
    let values = shown.iter().map(|point| quantity.of(point));
    let (least, most) = values.fold((f64::INFINITY, 0.0f64), |(least, most), value| {
        (least.min(value), most.max(value))
    });
    [(true, least), (false, most)]
        .map(|(below, inside)| Candidate::Bound {
            quantity,
            below,
            inside,
        })
        .to_vec()
}

fn shut_out(candidate: &Candidate, shown: &[&Point], without: &[&Point]) -> Places {
    let mut places = Places::none(without.len());
    for (place, point) in without.iter().enumerate() {
        if candidate.fails_by(point, shown).is_some() {
            places.insert(place);
        }
    }
    places
}

/// Drops conditions that nothing needs, the later ones first: what was forced came first.
fn prune(chosen: &mut Vec<(Candidate, Places)>, count: usize) {
    for place in (0..chosen.len()).rev() {
        let mut others = Places::none(count);
        for (other, (_, places)) in chosen.iter().enumerate() {
            if other != place {
                others.union(places);
            }
        }
        if chosen[place].1.beyond(&others) == 0 {
            chosen.remove(place);
        }
    }
}

/// For each bound the value beyond it: that of the nearest counter-example that it alone shuts out. Where two bounds shut one out, both at their outermost, and
/// neither would half way to its own, the bound that is farther from it is drawn in.
fn outsides(
    chosen: &[(Candidate, Places)],
    shown: &[&Point],
    without: &[&Point],
) -> Vec<Option<f64>> {
    let mut outsides: Vec<Option<f64>> = vec![None; chosen.len()];
    let shuts = |c: usize, n: usize| chosen[c].1.contains(n);
    let draw_in = |outsides: &mut Vec<Option<f64>>, c: usize, n: usize| {
        if let Candidate::Bound {
            quantity, below, ..
        } = chosen[c].0
            && quantity.applies(without[n])
        {
            let value = quantity.of(without[n]);
            let nearer = |old: f64| {
                if below {
                    old.max(value)
                } else {
                    old.min(value)
                }
            };
            outsides[c] = Some(outsides[c].map_or(value, nearer));
        }
    };
    for n in 0..without.len() {
        let mut by = (0..chosen.len()).filter(|&c| shuts(c, n));
        if let (Some(only), None) = (by.next(), by.next()) {
            draw_in(&mut outsides, only, n);
        }
    }
    for n in 0..without.len() {
        let stays_out = |c: usize| match chosen[c].0 {
            Candidate::Category(_) => true,
            Candidate::Bound {
                quantity,
                below,
                inside,
            } => {
                let value = quantity.of(without[n]);
                // No nearer than half way, on a log scale; whole numbers lie a little farther in.
                outsides[c].is_some_and(|outside| {
                    let half = (inside * outside).sqrt();
                    !quantity.applies(without[n]) || if below { value < half } else { value > half }
                })
            }
        };
        let by: Vec<usize> = (0..chosen.len()).filter(|&c| shuts(c, n)).collect();
        if by.iter().any(|&c| stays_out(c)) {
            continue;
        }
        let distance = |c: &usize| chosen[*c].0.fails_by(without[n], shown).unwrap_or(0.0);
        let farthest = by
            .into_iter()
            .max_by(|a, b| distance(a).total_cmp(&distance(b)));
        if let Some(c) = farthest {
            draw_in(&mut outsides, c, n);
        }
    }
    outsides
}

/// The conditions with both sides of each bound.
fn factors(chosen: &[(Candidate, Places)], shown: &[&Point], without: &[&Point]) -> Vec<Factor> {
    let outsides = outsides(chosen, shown, without);
    let mut factors: Vec<Factor> = Vec::new();
    for (place, (candidate, places)) in chosen.iter().enumerate() {
        match *candidate {
            Candidate::Category(category) => {
                let alone = |n: &usize| {
                    let mut others = chosen.iter().enumerate();
                    places.contains(*n)
                        && !others.any(|(other, (_, places))| other != place && places.contains(*n))
                };
                let distinct = |points: &mut dyn Iterator<Item = &Point>| {
                    let mut values: Vec<Choice> = points.map(|p| category.of(p)).collect();
                    values.sort_unstable();
                    values.dedup();
                    values
                };
                let its_own = (0..without.len()).filter(alone).map(|n| without[n]);
                factors.push(Factor::Among {
                    category,
                    anomalous: distinct(&mut shown.iter().copied()),
                    clean: distinct(&mut its_own.into_iter()),
                });
            }
            Candidate::Bound {
                quantity,
                below,
                inside,
            } => {
                // Shut out only where the quantity does not apply: the bound itself is anyone's guess.
                let guess = if below { inside / 2.0 } else { inside * 2.0 };
                let edge = Edge {
                    inside,
                    outside: outsides[place].unwrap_or(guess),
                    likely: None,
                };
                let both = factors.iter_mut().find_map(|factor| match factor {
                    Factor::Within {
                        quantity: of,
                        lower,
                        upper,
                    } if *of == quantity => Some((lower, upper)),
                    _ => None,
                });
                match both {
                    Some((lower, _)) if below => *lower = Some(edge),
                    Some((_, upper)) => *upper = Some(edge),
                    None => factors.push(Factor::Within {
                        quantity,
                        lower: below.then_some(edge),
                        upper: (!below).then_some(edge),
                    }),
                }
            }
        }
    }
    factors
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_pcg::Pcg64;

    use super::*;
    use crate::mfs::Mfs;
    use crate::monitor::Symptom;
    use crate::region::{Condition, Region};
    use crate::space::{Operation, Setting};

    fn base(space: &Space) -> Point {
        let point = space.sample(&mut Pcg64::seed_from_u64(4));
        let write = Choice::Operation(Operation::RcWrite);
        let point = space.with(&point, Setting::Choice(Category::Operation, write));
        set(space, &set(space, &point, Axis::Qps, 8), Axis::Regions, 8)
    }

    fn set(space: &Space, point: &Point, axis: Axis, value: u32) -> Point {
        space.with(point, Setting::Axis(axis, value))
    }

    fn region(fit: &Fit, anchor: &Point, space: &Space) -> Region {
        let symptom = Symptom {
            pause: Some(0.1),
            throughput: None,
            loss: None,
        };
        Mfs {
            factors: fit.factors.clone(),
            anchor: anchor.clone(),
            symptom,
            signature: vec![],
            probes: 0,
        }
        .region(space)
    }

    #[test]
    fn one_setting_that_differs_forces_its_condition_and_more_leave_a_guess() {
        let space = Space::default();
        let sick = set(&space, &base(&space), Axis::Qps, 100);
        let well = set(&space, &sick, Axis::Qps, 25);
        let fitted = fit(&[&sick], &[&well], &space).unwrap();
        assert!(fitted.guessed.is_empty());
        assert_eq!(
            region(&fitted, &sick, &space).to_string(),
            "queue pairs at least 50"
        );
        let farther = set(&space, &set(&space, &well, Axis::Sges, 1), Axis::Qps, 100);
        let farther = set(&space, &farther, Axis::Regions, 900);
        let fitted = fit(&[&sick], &[&well, &farther], &space).unwrap();
        assert_eq!(fitted.guessed, [1]);
    }

    #[test]
    fn numbers_that_make_up_for_each_other_are_bounded_by_their_product() {
        let space = Space::default();
        let at = |qps, regions| {
            let point = set(&space, &base(&space), Axis::Qps, qps);
            set(&space, &point, Axis::Regions, regions)
        };
        let sick = [at(100, 12), at(10, 120), at(300, 4)];
        let well = [at(10, 90), at(80, 12), at(200, 5)];
        let fitted = fit(
            &sick.iter().collect::<Vec<_>>(),
            &well.iter().collect::<Vec<_>>(),
            &space,
        )
        .unwrap();
        let region = region(&fitted, &sick[0], &space);
        assert!(
            matches!(
                region.conditions[..],
                [Condition::Within {
                    quantity: Quantity::Product(Axis::Qps, Axis::Regions),
                    at_least: Some(_),
                    at_most: None
                }]
            ),
            "{region}"
        );
    }

    #[test]
    fn the_same_workload_sick_and_well_is_no_conjunction() {
        let space = Space::default();
        let point = base(&space);
        assert_eq!(fit(&[&point], &[&point], &space), None);
    }

    proptest::proptest! {
        /// Whatever the points: a fit admits what shows the anomaly and nothing that does not.
        #[test]
        fn a_fit_is_consistent(seed: u64, sick in 1usize..6, well in 0usize..40) {
            let space = Space::default();
            let mut rng = Pcg64::seed_from_u64(seed);
            let mut draw = |count| -> Vec<Point> { (0..count).map(|_| space.sample(&mut rng)).collect() };
            let (sick, well) = (draw(sick), draw(well));
            if let Some(fitted) = fit(&sick.iter().collect::<Vec<_>>(), &well.iter().collect::<Vec<_>>(), &space) {
                let region = region(&fitted, &sick[0], &space);
                for point in &sick {
                    proptest::prop_assert!(region.contains(point), "{region}: {point:?}");
                }
                for point in &well {
                    proptest::prop_assert!(!region.contains(point), "{region}: {point:?}");
                }
            }
        }
    }
}
