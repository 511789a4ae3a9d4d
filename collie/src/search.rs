//! The search: random warm-up, annealing on one signal after another outside what is known, and the minimal feature set of each anomaly met (Collie,
//! Algorithm 1).
//!
//! What differs from the published algorithm, and why:
//! * While random points keep showing anomalies of a new look, random points are drawn: nothing guided is faster then.
//!   Settings that were anomalous every time, too often for chance, are left out meanwhile.
//! * Annealing starts at the measured point with the greatest *unexplained* signal, not at a random one. What a known anomaly drives as a point nears its conditions is
//!   taken off first; else every start would lie at the border of what is known.
//! * A mutation tries the ends of an axis before its middle, for conditions are bounds; a dimension whose two ends change nothing is left alone
//!   for the rest of the round.
//! * What takes long to set up, many queue pairs and regions, is tried last: a climb starts with fewer of them if the signal stays.
//! * A minimal feature set is learnt roughly when it is met and finely once nothing new has been met for a while.

use std::collections::{BTreeMap, HashSet};

use rand::{RngExt, SeedableRng};
use rand_pcg::Pcg64;

use crate::case::{Case, Severity, Sight};
use crate::ideas::{Ideas, knee};
use crate::mfs::Mfs;
use crate::region::{Condition, Region};
use crate::session::{OutOfTime, Purpose, Record, Session};
use crate::space::{Axis, Category, Choice, Feature, Operation, Point, Setting, Space};

/// Random points by which signals are first ranked, as in the paper.
const RANKING_POINTS: usize = 10;
/// Random points without an anomaly of a new look, after which guidance pays.
const PATIENCE: usize = 24;
/// Probes of searching without a new anomaly, after which most of the time goes to what is known: so many probes for one of searching.
const STAGNATION: usize = 60;
const REFINEMENT: usize = 3;
/// A setting that was anomalous every time is left out of random draws once chance explains it with less than this.
const CHANCE: f64 = 0.01;
/// Random points after a round in vain, and how many are drawn to choose each from.
const FRESH_POINTS: usize = 3;
const CANDIDATES: usize = 8;
/// Two records differ in a signal if they do by this many standard errors of their difference.
const SIGNIFICANT: f64 = 2.0;
/// Annealing: the first temperature (of relative energy, so 0.1 is a tenth of the signal), the factor per mutation, and the last.
const TEMPERATURE: (f64, f64, f64) = (0.1, 0.93, 0.005);

/// What the search drives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signals {
    /// Each diagnostic counter, upwards.
    Diagnostic,
    /// Throughput, downwards: every adapter has it.
    Performance,
}

/// Variants of the search.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// What it drives.
    pub signals: Signals,
    /// Whether it learns minimal feature sets and keeps clear of them.
    pub learns: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            signals: Signals::Diagnostic,
            learns: true,
        }
    }
}

/// A search under way.
pub struct Search<'s, 'a> {
    pub(crate) session: &'s mut Session<'a>,
    pub(crate) rng: Pcg64,
    pub(crate) known: Vec<Case>,
    /// What [`Search::try_point`] measures for.
    pub(crate) purpose: Purpose,
    /// The signals of each record, as far as they were computed.
    all_signals: Vec<Vec<f64>>,
    options: Options,
    /// The counters where nothing drives them: the lower quartile of random points.
    idle: Vec<f64>,
    /// Anomalous records that no further learning is due to.
    pub(crate) settled: HashSet<usize>,
    /// Records, with a signal, that no further round starts from: one did, or passed them without meeting an anomaly.
    spent: HashSet<(usize, usize)>,
    /// How often a round started from an operation and a signal.
    rounds: Vec<(Operation, usize, u32)>,
    /// For each dimension: how many changes of it helped, and how many were tried.
    relevance: BTreeMap<Feature, (u32, u32)>,
    /// Search probes when the last anomaly became known.
    last_news: usize,
}

impl<'s, 'a> Search<'s, 'a> {
    /// A search whose choices follow from the seed.
    pub fn new(session: &'s mut Session<'a>, options: Options, seed: u64) -> Self {
        Search {
            session,
            rng: Pcg64::seed_from_u64(seed),
            known: Vec::new(),
            purpose: Purpose::Extract,
            all_signals: Vec::new(),
            options,
            idle: Vec::new(),
            settled: HashSet::new(),
            spent: HashSet::new(),
            rounds: Vec::new(),
            relevance: BTreeMap::new(),
            last_news: 0,
        }
    }

    /// Searches until the time is over, and returns what each anomaly needs.
    pub fn run(mut self) -> Vec<Mfs> {
        let OutOfTime = match self.go() {
            Err(over) => over,
            Ok(never) => match never {},
        };
        for place in 0..self.known.len() {
            let mut case = self.known[place].clone();
            self.refit(&mut case);
            self.known[place] = case;
        }
        self.drop_redundant();
        self.known.into_iter().map(|case| case.mfs).collect()
    }

    fn go(&mut self) -> Result<std::convert::Infallible, OutOfTime> {
        self.draw_at_random()?;
        loop {
            if self.options.learns {
                let nested = self.searched() - self.last_news > STAGNATION;
                while let Some(index) = self.unsettled(nested) {
                    self.settled.insert(index);
                    self.update_signals();
                    if !self.adopt(index)? {
                        self.learn(index)?;
                        self.last_news = self.searched();
                    }
                }
            }
            self.drop_redundant();
            let before = self.session.records().len();
            self.anneal()?;
            if self.options.learns && self.searched() - self.last_news > STAGNATION {
                // In proportion to what the round took, so that neither starves.
                while self.session.records().len() - before
                    < (1 + REFINEMENT) * self.searched_since(before).max(1)
                    && self.refine()?
                {}
            }
        }
    }

    fn searched(&self) -> usize {
        self.searched_since(0)
    }

    fn searched_since(&self, first: usize) -> usize {
        self.session.records()[first..]
            .iter()
            .filter(|record| record.purpose == Purpose::Search)
            .count()
    }

    /// An anomalous record that belongs to nothing known: of those there are, one of the look that most of them have. What is common is soonest learnt,
    /// and out of the way of the rest.
    fn unsettled(&mut self, nested: bool) -> Option<usize> {
        self.update_signals();
        let regions = self.known_regions();
        let records = self.session.records();
        let foreign: Vec<usize> = (0..records.len())
            .filter(|i| {
                let record = &records[*i];
                !self.settled.contains(i)
                    && record.verdict.symptom().is_some()
                    && (nested || !regions.iter().any(|region| region.contains(&record.point)))
                    && !self.accounted_for(*i, &regions, None)
            })
            .collect();
        let alike = |index: &usize| {
            let record = &records[*index];
            let symptom = *record.verdict.symptom().expect("an anomalous record");
            let case = Case::new(*index, record, symptom, self.all_signals[*index].clone());
            let shows = |&other: &usize| {
                case.sight(&records[other], &self.all_signals[other]) == Some(Sight::Shows)
            };
            foreign.iter().filter(|other| shows(other)).count()
        };
        foreign.iter().copied().rev().max_by_key(alike)
    }

    /// Drops what is known of an anomaly where the others, the newer first, account for every workload that showed it.
    fn drop_redundant(&mut self) {
        self.update_signals();
        // A workload that shows two anomalies partly, or one of them wholly, is of the latter.
        for place in 0..self.known.len() {
            let regions = self.known_regions();
            let (case, records) = (&self.known[place], self.session.records());
            let sight =
                |case: &Case, index: usize| case.sight(&records[index], &self.all_signals[index]);
            let kept: Vec<usize> = case
                .shown
                .iter()
                .copied()
                .enumerate()
                .filter(|&(nth, index)| {
                    nth == 0
                        || sight(case, index) != Some(Sight::Partly)
                        || !self.known.iter().zip(&regions).enumerate().any(
                            |(other, (rival, region))| {
                                other != place
                                    && region.contains(&records[index].point)
                                    && sight(rival, index) == Some(Sight::Shows)
                            },
                        )
                })
                .map(|(_, index)| index)
                .collect();
            if kept.len() < case.shown.len() {
                let mut case = self.known[place].clone();
                case.shown = kept;
                self.refit(&mut case);
                self.known[place] = case;
            }
        }
        for place in (0..self.known.len()).rev() {
            let regions = self.known_regions();
            let by_others = |&index: &usize| self.accounted_for(index, &regions, Some(place));
            if self.known[place].shown.iter().all(by_others) {
                self.known.remove(place);
            }
        }
    }

    /// Whether known anomalies account for what a record shows: it meets the conditions of one of them, and in each respect is no worse than those, or as bad as
    /// one whose counters say that it is there too.
    fn accounted_for(&self, index: usize, known: &[Region], without: Option<usize>) -> bool {
        let record = &self.session.records()[index];
        let Some(symptom) = record.verdict.symptom() else {
            return true;
        };
        let mut within = None::<Severity>;
        let mut left = Severity::of(symptom);
        for (place, (region, case)) in known.iter().zip(&self.known).enumerate() {
            if without == Some(place) {
                continue;
            }
            if region.contains(&record.point) {
                within = Some(case.severity.worst(within.unwrap_or(case.severity)));
            } else if case.speaks_for(&self.all_signals[index]) {
                left = left.without(&case.severity);
            }
        }
        within.is_some_and(|within| !left.exceeds(&within))
    }

    /// The signals of each record, as of the last update.
    pub(crate) fn all_signals(&self) -> &[Vec<f64>] {
        &self.all_signals
    }

    /// Computes the signals of records that are new.
    pub(crate) fn update_signals(&mut self) {
        for index in self.all_signals.len()..self.session.records().len() {
            let signals = self.signals(&self.session.records()[index]);
            self.all_signals.push(signals);
        }
    }

    /// Random points, as long as they show anomalies of a new look.
    fn draw_at_random(&mut self) -> Result<(), OutOfTime> {
        let (mut looks, mut since, mut left_out) = (HashSet::new(), 0, Vec::new());
        while self.session.records().len() < RANKING_POINTS || since < PATIENCE {
            let point = self.random_point(&left_out);
            let index = self.session.probe(&point, Purpose::Search)?;
            self.settle_idle();
            let record = &self.session.records()[index];
            since += 1;
            if let Some(symptom) = record.verdict.symptom() {
                let look = (
                    crate::mfs::dominant(&self.signals(record)),
                    symptom.pause.is_some(),
                    symptom.throughput.is_some(),
                );
                if looks.insert(look) {
                    since = 0;
                }
            }
            if self.options.learns {
                left_out = surely_anomalous(self.session.records(), self.session.space());
            }
        }
        Ok(())
    }

    /// A random point outside what is known and outside these regions.
    pub(crate) fn random_point(&mut self, left_out: &[Region]) -> Point {
        let mut point = self.session.space().sample(&mut self.rng);
        let known = self.known_regions();
        for _ in 0..1000 {
            if !known
                .iter()
                .chain(left_out)
                .any(|region| region.contains(&point))
            {
                break;
            }
            point = self.session.space().sample(&mut self.rng);
        }
        point
    }

    pub(crate) fn known_regions(&self) -> Vec<Region> {
        self.known
            .iter()
            .map(|case| case.mfs.region(self.session.space()))
            .collect()
    }

    fn settle_idle(&mut self) {
        let valid: Vec<&Record> = self
            .session
            .records()
            .iter()
            .filter(|record| !record.counters.is_empty())
            .collect();
        let count = valid.first().map_or(0, |record| record.counters.len());
        self.idle = (0..count)
            .map(|i| {
                let mut values: Vec<f64> = valid.iter().map(|record| record.counters[i]).collect();
                values.sort_by(f64::total_cmp);
                values[values.len() / 4].max(f64::MIN_POSITIVE)
            })
            .collect();
    }

    /// What a record shows of each thing that is driven: 0 where nothing is wrong, the higher the worse.
    pub(crate) fn signals(&self, record: &Record) -> Vec<f64> {
        match self.options.signals {
            Signals::Performance => vec![(1.0 - record.throughput).max(0.0)],
            Signals::Diagnostic => record
                .counters
                .iter()
                .zip(&self.idle)
                .map(|(value, idle)| (value / idle - 1.0).max(0.0))
                .collect(),
        }
    }

    /// The part of a signal that no known anomaly accounts for.
    fn unexplained(&self, record: &Record, signal: usize, known: &[Region]) -> f64 {
        let value = self.signals(record)[signal];
        let space = self.session.space();
        let explained: f64 = known
            .iter()
            .zip(&self.known)
            .map(|(region, case)| {
                case.mfs.signature.get(signal).copied().unwrap_or(0.0)
                    * region.nearness(&record.point, space)
            })
            .sum();
        // The account is rough: some of what it leaves over is its own error.
        value - 1.25 * explained
    }

    /// One round from the most promising point along one signal.
    fn anneal(&mut self) -> Result<(), OutOfTime> {
        let known = self.known_regions();
        let first = self.session.records().len();
        if let Some((start, signal)) = self.start(&known) {
            if self.round(start, signal, &known)? {
                return Ok(());
            }
            let last = self.session.records().len();
            self.spent
                .extend((first..last).map(|index| (index, signal)));
        }
        // A round in vain: new points to start from, where the fewest were measured.
        for _ in 0..FRESH_POINTS {
            let point = self.rare_point();
            let index = self.session.probe(&point, Purpose::Search)?;
            if self.session.records()[index].verdict.symptom().is_some() {
                break;
            }
        }
        Ok(())
    }

    /// A random point outside what is known, of the transport, direction and MTU that were measured least.
    fn rare_point(&mut self) -> Point {
        let cell = |point: &Point| (point.operation, point.direction, point.mtu);
        let candidates: Vec<Point> = (0..CANDIDATES).map(|_| self.random_point(&[])).collect();
        let measured = |point: &Point| {
            self.session
                .records()
                .iter()
                .filter(|record| cell(&record.point) == cell(point))
                .count()
        };
        candidates
            .into_iter()
            .min_by_key(measured)
            .expect("there are candidates")
    }

    /// A workload that takes less time to set up and shows at least half as much of a signal, or the same one. None if it is anomalous.
    fn cheapen(
        &mut self,
        start: usize,
        signal: usize,
        known: &[Region],
    ) -> Result<Option<usize>, OutOfTime> {
        let before = self.session.records()[start].clone();
        let at_most = |point: &Point, axis: Axis| {
            let most = knee(axis).min(axis.of(point));
            self.session.space().with(point, Setting::Axis(axis, most))
        };
        let fewer_regions = at_most(&before.point, Axis::Regions);
        let fewer_qps = at_most(&before.point, Axis::Qps);
        let mut cheaper = vec![at_most(&fewer_regions, Axis::Qps)];
        if fewer_regions != before.point && fewer_qps != before.point {
            cheaper.extend([fewer_regions, fewer_qps]);
        }
        for point in cheaper {
            if point == before.point || known.iter().any(|region| region.contains(&point)) {
                continue;
            }
            let index = self.session.probe(&point, Purpose::Search)?;
            let record = &self.session.records()[index];
            if record.verdict.symptom().is_some() {
                return Ok(None);
            }
            let left = self.unexplained(record, signal, known);
            if left > 0.5 * self.unexplained(&before, signal, known) && left > 3.0 * record.noise {
                return Ok(Some(index));
            }
        }
        Ok(Some(start))
    }

    /// True if it met an anomaly.
    fn round(&mut self, start: usize, signal: usize, known: &[Region]) -> Result<bool, OutOfTime> {
        let mut here = match self.cheapen(start, signal, known)? {
            Some(here) => here,
            None => return Ok(true),
        };
        let mut ideas = Ideas::new(self.session.space());
        let (mut temperature, cooling, coldest) = TEMPERATURE;
        while temperature > coldest {
            let current = self.session.records()[here].clone();
            let Some(setting) = ideas.next(&current.point, &self.relevance, &mut self.rng) else {
                break;
            };
            let point = self.session.space().with(&current.point, setting);
            if point == current.point {
                continue;
            }
            if self.options.learns && known.iter().any(|region| region.contains(&point)) {
                ideas.postponed.push(setting);
                continue;
            }
            let index = self.session.probe(&point, Purpose::Search)?;
            temperature *= cooling;
            let record = &self.session.records()[index];
            if record.verdict.symptom().is_some() {
                return Ok(true);
            }
            if record.counters.is_empty() {
                continue;
            }
            let (a, b) = (
                1.0 + self.unexplained(&current, signal, known).max(0.0),
                1.0 + self.unexplained(record, signal, known).max(0.0),
            );
            let energy = (a - b) / b;
            let significant = SIGNIFICANT * current.noise.hypot(record.noise);
            let relevance = self.relevance.entry(setting.feature()).or_default();
            *relevance = (
                relevance.0 + u32::from(energy < -significant),
                relevance.1 + 1,
            );
            ideas.learn(setting, &current.point, energy, significant);
            let indifferent = energy.abs() <= significant;
            if energy < -significant
                || (indifferent && ideas.is_deeper(setting, &current.point))
                || (energy > 0.0 && self.rng.random_bool((-energy / temperature).exp().min(1.0)))
            {
                here = index;
                // What led into known anomalies from where the round was may lead elsewhere from here.
                ideas.untried.append(&mut ideas.postponed);
            }
        }
        Ok(false)
    }

    /// The clean record with the greatest unexplained signal, of the operations and signals tried least. Ranks signals by the noise in them.
    fn start(&mut self, known: &[Region]) -> Option<(usize, usize)> {
        let mut best: Option<(f64, usize, usize)> = None;
        for (index, record) in self.session.records().iter().enumerate() {
            if !record.verdict.is_clean() {
                continue;
            }
            for signal in 0..self.signals(record).len() {
                let rounds = self
                    .rounds
                    .iter()
                    .find(|r| (r.0, r.1) == (record.point.operation, signal))
                    .map_or(0, |r| r.2);
                // Over the noise, by orders of magnitude: what is strong is not more promising in proportion.
                let promise = (self.unexplained(record, signal, known) / (3.0 * record.noise)).ln()
                    / (1.0 + f64::from(rounds));
                if promise > 0.0
                    && best.is_none_or(|(most, ..)| promise > most)
                    && !self.spent.contains(&(index, signal))
                {
                    best = Some((promise, index, signal));
                }
            }
        }
        let (_, index, signal) = best?;
        self.spent.insert((index, signal));
        let operation = self.session.records()[index].point.operation;
        match self
            .rounds
            .iter_mut()
            .find(|r| (r.0, r.1) == (operation, signal))
        {
            Some(round) => round.2 += 1,
            None => self.rounds.push((operation, signal, 1)),
        }
        Some((index, signal))
    }
}

/// Settings, alone or in pairs, that were anomalous every time, where others were so rarely that chance does not explain it.
fn surely_anomalous(records: &[Record], space: &Space) -> Vec<Region> {
    let values: Vec<(Category, Choice)> = Category::ALL
        .into_iter()
        .flat_map(|category| {
            space
                .choices(category)
                .into_iter()
                .map(move |choice| (category, choice))
        })
        .collect();
    let mut candidates: Vec<Region> = Vec::new();
    let only = |(category, choice): (Category, Choice)| Condition::Among {
        category,
        values: vec![choice],
    };
    for (i, &a) in values.iter().enumerate() {
        candidates.push(Region {
            conditions: vec![only(a)],
        });
        candidates.extend(
            values[i + 1..]
                .iter()
                .filter(|b| b.0 != a.0)
                .map(|&b| Region {
                    conditions: vec![only(a), only(b)],
                }),
        );
    }
    let mut found: Vec<Region> = Vec::new();
    loop {
        let open: Vec<&Record> = records
            .iter()
            .filter(|record| {
                record.verdict.confidence() > 0.0
                    && !found.iter().any(|region| region.contains(&record.point))
            })
            .collect();
        let best = candidates
            .iter()
            .filter_map(|region| {
                let (inside, outside): (Vec<&Record>, Vec<&Record>) = open
                    .iter()
                    .partition(|record| region.contains(&record.point));
                let anomalous = |list: &[&Record]| {
                    list.iter()
                        .filter(|record| record.verdict.symptom().is_some())
                        .count()
                };
                if inside.len() < 3 || anomalous(&inside) < inside.len() {
                    return None;
                }
                let rate = (anomalous(&outside) as f64 + 1.0) / (outside.len() as f64 + 2.0);
                Some((rate.powi(inside.len() as i32), region))
            })
            .min_by(|a, b| a.0.total_cmp(&b.0));
        match best {
            Some((chance, region)) if chance * (candidates.len() as f64).sqrt() < CHANCE => {
                found.push(region.clone())
            }
            _ => return found,
        }
    }
}
