//! Section `[scheduler]`: which of the shipped policies plans, and what it goes by.
//!
//! The server's own scheduler and every `volley scheduler` take it from their own configuration, so a policy can be changed without touching the server: start schedulers with
//! another file and drain the old ones.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use volley_actors::{
    Arrival, Batching, EarliestDeadline, FairShare, Order, Pace, PolicyScheduler, Scheduler,
    SloClass, TenantWeights,
};

use super::problem::Problem;
use super::raw::{PolicyName, RawScheduler};

/// Stands for every tenant without a weight of its own.
const EVERYBODY: &str = "*";

/// Section `[scheduler]`.
#[derive(Debug, Clone, PartialEq)]
pub struct SchedulerSettings {
    /// Who comes first.
    pub order: OrderSettings,
    /// The time that steps are composed to, if any.
    pub pace: Option<Duration>,
}

/// Who comes first, with what decides it.
#[derive(Debug, Clone, PartialEq)]
pub enum OrderSettings {
    /// Who arrived first.
    FirstCome,
    /// The tenant that got the least for its weight.
    FairShare {
        /// Of tenants by name.
        weights: BTreeMap<String, f64>,
        /// Of all others.
        other: f64,
    },
    /// Whose first token is due first.
    EarliestDeadline {
        /// By priority.
        classes: Vec<SloClass>,
        /// Target of those below every class.
        target: Duration,
    },
}

impl SchedulerSettings {
    /// What was typed, checked; what is wrong is added to `problems`.
    pub(super) fn resolve(raw: &RawScheduler, problems: &mut Vec<Problem>) -> Self {
        let mut refuse = |key: &str, message: String| problems.push(Problem::derived(key, message));
        let of_others = [
            ("scheduler.weights", &raw.weights, PolicyName::FairShare),
            (
                "scheduler.classes",
                &raw.classes,
                PolicyName::EarliestDeadline,
            ),
        ];
        for (key, value, policy) in of_others {
            if value.is_some() && raw.policy != policy {
                let message = format!(
                    "says nothing to the policy `{}`; it is for `{}`",
                    raw.policy.name(),
                    policy.name()
                );
                refuse(key, message);
            }
        }
        let order = match raw.policy {
            PolicyName::FirstCome => OrderSettings::FirstCome,
            PolicyName::FairShare => {
                let text = raw.weights.as_deref().unwrap_or_default();
                let parsed = weights(text).and_then(|(weights, other)| {
                    TenantWeights::new(weights.clone(), other).map_err(|e| e.to_string())?;
                    Ok((weights, other))
                });
                let (weights, other) = parsed.unwrap_or_else(|message| {
                    refuse("scheduler.weights", message);
                    (BTreeMap::new(), 1.0)
                });
                OrderSettings::FairShare { weights, other }
            }
            PolicyName::EarliestDeadline => {
                let text = raw.classes.as_deref().unwrap_or_default();
                OrderSettings::EarliestDeadline {
                    classes: classes(text).unwrap_or_else(|message| {
                        refuse("scheduler.classes", message);
                        Vec::new()
                    }),
                    target: Duration::from_secs_f64(raw.target_s),
                }
            }
        };
        let pace = (raw.pace_s > 0.0).then(|| Duration::from_secs_f64(raw.pace_s));
        SchedulerSettings { order, pace }
    }

    /// A scheduler like that, with at most `prefill_tokens` of prompts in one worker's step and `fill` rows in a micro-batch before there is another.
    pub fn scheduler(&self, prefill_tokens: u32, fill: u32) -> Box<dyn Scheduler> {
        match &self.order {
            OrderSettings::FirstCome => self.batching(Arrival, prefill_tokens, fill),
            OrderSettings::FairShare { weights, other } => {
                // They were checked when they were read.
                let weights = TenantWeights::new(weights.clone(), *other).unwrap_or_default();
                self.batching(FairShare::new(weights), prefill_tokens, fill)
            }
            OrderSettings::EarliestDeadline { classes, target } => {
                let order = EarliestDeadline::new(classes.clone(), *target);
                self.batching(order, prefill_tokens, fill)
            }
        }
    }

    fn batching<O: Order + 'static>(
        &self,
        order: O,
        prefill: u32,
        fill: u32,
    ) -> Box<dyn Scheduler> {
        let batching = Batching::by(order, prefill, fill);
        Box::new(PolicyScheduler::new(match self.pace {
            Some(pace) => batching.paced(Pace::new(pace)),
            None => batching,
        }))
    }

    /// The policy's name.
    pub(super) fn policy(&self) -> &'static str {
        match self.order {
            OrderSettings::FirstCome => PolicyName::FirstCome,
            OrderSettings::FairShare { .. } => PolicyName::FairShare,
            OrderSettings::EarliestDeadline { .. } => PolicyName::EarliestDeadline,
        }
        .name()
    }

    /// `scheduler.weights` as it would be typed.
    pub(super) fn weights(&self) -> Option<String> {
        let OrderSettings::FairShare { weights, other } = &self.order else {
            return None;
        };
        let mut text = format!("{EVERYBODY}={other}");
        for (tenant, weight) in weights {
            let _ = write!(text, ",{tenant}={weight}");
        }
        Some(text)
    }

    /// `scheduler.classes` as it would be typed.
    pub(super) fn classes(&self) -> Option<String> {
        let OrderSettings::EarliestDeadline { classes, .. } = &self.order else {
            return None;
        };
        let class = |class: &SloClass| format!("{}={}", class.priority, class.target.as_secs_f64());
        let classes: Vec<String> = classes.iter().map(class).collect();
        (!classes.is_empty()).then(|| classes.join(","))
    }

    /// `scheduler.target_s`.
    pub(super) fn target(&self) -> Option<Duration> {
        match self.order {
            OrderSettings::EarliestDeadline { target, .. } => Some(target),
            _ => None,
        }
    }
}

/// `name=number` with commas between.
fn pairs(text: &str) -> impl Iterator<Item = Result<(&str, f64), String>> {
    let parts = text.split(',').map(str::trim).filter(|p| !p.is_empty());
    parts.map(|part| {
        // A tenant's name may hold an equals sign; a number holds none.
        let pair = part.rsplit_once('=').and_then(|(name, number)| {
            let number: f64 = number.trim().parse().ok()?;
            Some((name.trim(), number))
        });
        pair.ok_or_else(|| format!("has `{part}`, which is not NAME=NUMBER"))
    })
}

fn weights(text: &str) -> Result<(BTreeMap<String, f64>, f64), String> {
    let mut weights = BTreeMap::new();
    for pair in pairs(text) {
        let (tenant, weight) = pair?;
        if weights.insert(tenant.to_owned(), weight).is_some() {
            return Err(format!("names `{tenant}` twice"));
        }
    }
    let other = weights.remove(EVERYBODY).unwrap_or(1.0);
    Ok((weights, other))
}

fn classes(text: &str) -> Result<Vec<SloClass>, String> {
    let mut classes: Vec<SloClass> = Vec::new();
    for pair in pairs(text) {
        let (priority, seconds) = pair?;
        let priority: i32 = priority.parse().map_err(|_| {
            format!("has a class `{priority}`, which is no priority: a whole number")
        })?;
        if !(0.001..=86_400.0).contains(&seconds) {
            return Err(format!(
                "gives the class {priority} {seconds} s; it must be from 0.001 to 86400"
            ));
        }
        if classes.iter().any(|class| class.priority == priority) {
            return Err(format!("names the class {priority} twice"));
        }
        classes.push(SloClass {
            priority,
            target: Duration::from_secs_f64(seconds),
        });
    }
    Ok(classes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(policy: PolicyName) -> RawScheduler {
        RawScheduler {
            policy,
            weights: None,
            classes: None,
            target_s: 60.0,
            pace_s: 0.0,
        }
    }

    #[test]
    fn what_was_typed_is_what_is_printed() {
        let mut problems = Vec::new();
        let fair = RawScheduler {
            weights: Some("search=4, *=2,batch=0.25".to_owned()),
            pace_s: 0.05,
            ..raw(PolicyName::FairShare)
        };
        let fair = SchedulerSettings::resolve(&fair, &mut problems);
        assert_eq!(fair.policy(), "fair-share");
        assert_eq!(fair.weights().as_deref(), Some("*=2,batch=0.25,search=4"));
        assert_eq!(fair.pace, Some(Duration::from_millis(50)));
        let deadline = RawScheduler {
            classes: Some("10=0.5,0=5".to_owned()),
            ..raw(PolicyName::EarliestDeadline)
        };
        let deadline = SchedulerSettings::resolve(&deadline, &mut problems);
        assert_eq!(deadline.classes().as_deref(), Some("10=0.5,0=5"));
        assert_eq!(deadline.target(), Some(Duration::from_secs(60)));
        assert!(problems.is_empty(), "{problems:?}");
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (policy, weights, classes, message) in [
            (
                PolicyName::FairShare,
                "search",
                "",
                "`search`, which is not NAME=NUMBER",
            ),
            (PolicyName::FairShare, "a=1,a=2", "", "names `a` twice"),
            (PolicyName::FairShare, "a=0", "", "tenant `a` is 0"),
            (PolicyName::FirstCome, "a=1", "", "it is for `fair-share`"),
            (
                PolicyName::EarliestDeadline,
                "",
                "fast=1",
                "`fast`, which is no priority",
            ),
            (
                PolicyName::EarliestDeadline,
                "",
                "1=0",
                "must be from 0.001 to 86400",
            ),
            (
                PolicyName::EarliestDeadline,
                "",
                "1=NaN",
                "must be from 0.001 to 86400",
            ),
            (
                PolicyName::EarliestDeadline,
                "",
                "1=1,1=2",
                "names the class 1 twice",
            ),
            (
                PolicyName::FairShare,
                "",
                "1=1",
                "it is for `earliest-deadline`",
            ),
        ] {
            let given = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            let raw = RawScheduler {
                weights: given(weights),
                classes: given(classes),
                ..raw(policy)
            };
            let mut problems = Vec::new();
            SchedulerSettings::resolve(&raw, &mut problems);
            let told: Vec<&str> = problems.iter().map(|p| &*p.message).collect();
            assert!(
                told.len() == 1 && told[0].contains(message),
                "{weights}{classes}: {told:?}"
            );
        }
    }
}
