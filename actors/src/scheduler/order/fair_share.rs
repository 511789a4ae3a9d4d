//! A fair share for every tenant, by weight: start-time fair queuing over tokens.
//!
//! Each tenant has a counter of the tokens computed for it, divided by its weight; the waiting sequence of the tenant with the smallest counter starts next. A tenant that comes back
//! after a pause begins at the smallest counter of those that were busy meanwhile: silence is not saved up. The idea is the virtual token counter of Sheng et al.,
//! "Fairness in Serving Large Language Models" (OSDI 2024): over any time in which two tenants both have work waiting, what they get differs from their weights' ratio by no more than
//! the sequences that run already.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::{Order, Standing};
use crate::protocol::{Now, SequenceId};
use crate::{SequenceView, View};

/// What a generated token counts, in prompt tokens: decoding reads the whole cache for one token.
const DECODE_COST: f64 = 2.0;

/// The tenants' weights: who has twice the weight gets twice the tokens when both want more than there is.
#[derive(Debug, Clone, PartialEq)]
pub struct TenantWeights {
    named: BTreeMap<String, f64>,
    other: f64,
}

/// A weight that is no weight.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("the weight of tenant `{tenant}` is {weight}; it must be a number from 0.001 to 1000")]
pub struct WeightError {
    /// Whose.
    pub tenant: String,
    /// As given.
    pub weight: f64,
}

impl Default for TenantWeights {
    fn default() -> Self {
        TenantWeights {
            named: BTreeMap::new(),
            other: 1.0,
        }
    }
}

impl TenantWeights {
    /// Weights by name, and of every tenant that is not named.
    ///
    /// # Errors
    /// A weight is not from 0.001 to 1000.
    pub fn new(named: BTreeMap<String, f64>, other: f64) -> Result<Self, WeightError> {
        let all = named.iter().map(|(name, &weight)| (name.as_str(), weight));
        for (tenant, weight) in all.chain([("*", other)]) {
            if !(0.001..=1000.0).contains(&weight) {
                let tenant = tenant.to_owned();
                return Err(WeightError { tenant, weight });
            }
        }
        Ok(TenantWeights { named, other })
    }

    /// The weight of a tenant.
    pub fn of(&self, tenant: &str) -> f64 {
        self.named.get(tenant).copied().unwrap_or(self.other)
    }
}

/// See the module.
#[derive(Debug, Clone, Default)]
pub struct FairShare {
    weights: TenantWeights,
    /// Of each tenant that has sequences in the books.
    counters: BTreeMap<Arc<str>, f64>,
    /// Where a tenant begins that comes when nobody else is there.
    floor: f64,
}

impl FairShare {
    /// With these weights.
    pub fn new(weights: TenantWeights) -> Self {
        FairShare {
            weights,
            ..FairShare::default()
        }
    }

    /// Forgets tenants that left the books and lets in those that came.
    fn take_stock(&mut self, view: &View) {
        let present: BTreeSet<&Arc<str>> = view.sequences().map(|(_, s)| &s.tenant).collect();
        let counters = std::mem::take(&mut self.counters);
        let (stay, gone): (BTreeMap<_, _>, BTreeMap<_, _>) = counters
            .into_iter()
            .partition(|(tenant, _)| present.contains(tenant));
        self.counters = stay;
        let least = self.counters.values().copied().reduce(f64::min);
        // What those had that left at the same time is all that is known of the time before.
        let before = gone.values().copied().fold(self.floor, f64::max);
        self.floor = least.unwrap_or(before);
        for tenant in present {
            if !self.counters.contains_key(tenant) {
                self.counters.insert(Arc::clone(tenant), self.floor);
            }
        }
    }
}

/// What computing `tokens` of a sequence counts.
fn cost(sequence: &SequenceView, tokens: u32) -> f64 {
    if sequence.pending() == 1 {
        DECODE_COST * f64::from(tokens)
    } else {
        f64::from(tokens)
    }
}

impl Order for FairShare {
    /// By arrival: who has started goes on, whosesoever it is, or tenants would preempt each other in turns.
    fn standing(&self, sequence: SequenceId, _: &SequenceView) -> Standing {
        let key = Duration::ZERO;
        Standing { key, sequence }
    }

    fn line_up(&mut self, view: &View, waiting: &mut [SequenceId], _: Now) {
        self.take_stock(view);
        let mut lines: BTreeMap<&Arc<str>, VecDeque<SequenceId>> = BTreeMap::new();
        for &id in waiting.iter() {
            if let Some(sequence) = view.sequence(id) {
                lines.entry(&sequence.tenant).or_default().push_back(id);
            }
        }
        let mut counters = self.counters.clone();
        for place in waiting.iter_mut() {
            let next = lines
                .iter()
                .filter(|(_, line)| !line.is_empty())
                .map(|(&tenant, _)| tenant)
                .min_by(|a, b| counters[*a].total_cmp(&counters[*b]));
            let Some(tenant) = next else { return };
            let Some(id) = lines.get_mut(tenant).and_then(VecDeque::pop_front) else {
                return;
            };
            *place = id;
            if let (Some(counter), Some(sequence)) = (counters.get_mut(tenant), view.sequence(id)) {
                *counter += cost(sequence, sequence.pending()) / self.weights.of(tenant);
            }
        }
    }

    fn planned(&mut self, sequence: &SequenceView, tokens: u32) {
        let weight = self.weights.of(&sequence.tenant);
        let floor = self.floor;
        let counter = self
            .counters
            .entry(Arc::clone(&sequence.tenant))
            .or_insert(floor);
        *counter += cost(sequence, tokens) / weight;
    }
}
