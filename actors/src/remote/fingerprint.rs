//! What the processes of one cluster must agree on.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use volley_models::Isa;

use crate::cluster_config::ClusterConfig;

/// Names and values of everything that must be the same in all processes of a cluster, as text that people can compare.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    /// Must be equal.
    equal: BTreeMap<String, String>,
    /// Should be equal: results may differ in the last bits otherwise.
    alike: BTreeMap<String, String>,
}

/// One value that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// What.
    pub name: String,
    /// Its value here.
    pub ours: String,
    /// Its value at the other process.
    pub theirs: String,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Difference { name, ours, theirs } = self;
        write!(f, "{name} is {ours} here and {theirs} there")
    }
}

impl Fingerprint {
    /// Of a configuration and a model, whose content is told by `model_hash`.
    pub fn new(config: &ClusterConfig, model: &str, model_hash: &str) -> Self {
        let quantize = config.quantize.map(|quantization| quantization.to_string());
        let equal = [
            ("volley", env!("CARGO_PKG_VERSION").to_owned()),
            ("model", model.to_owned()),
            ("model.hash", model_hash.to_owned()),
            ("model.dtype", config.dtype.to_string()),
            (
                "model.quantize",
                quantize.unwrap_or_else(|| "none".to_owned()),
            ),
            (
                "cluster.attention_workers",
                config.attention_workers.to_string(),
            ),
            ("cluster.expert_workers", config.expert_workers.to_string()),
            (
                "cluster.expert_replicas",
                config.expert_replicas.to_string(),
            ),
            ("cluster.spare_experts", config.spare_experts.to_string()),
            ("cluster.micro_batches", config.micro_batches.to_string()),
            ("cluster.block_tokens", config.block_tokens.to_string()),
            ("limits.max_context", config.context.to_string()),
            ("limits.max_batch_tokens", config.max_rows.to_string()),
            (
                "KV blocks of an attention worker",
                config.kv_blocks.to_string(),
            ),
        ];
        let text = |(name, value): (&str, String)| (name.to_owned(), value);
        let alike = [(
            "instruction set",
            Isa::detect().instruction_set().to_string(),
        )];
        Fingerprint {
            equal: equal.map(text).into(),
            alike: alike.map(text).into(),
        }
    }

    /// One more thing that must be equal.
    #[must_use]
    pub fn and(mut self, name: &str, value: &str) -> Self {
        self.equal.insert(name.to_owned(), value.to_owned());
        self
    }

    /// What must be equal and is not.
    pub fn differences(&self, theirs: &Fingerprint) -> Vec<Difference> {
        differences(&self.equal, &theirs.equal)
    }

    /// What should be equal and is not.
    pub fn dissimilarities(&self, theirs: &Fingerprint) -> Vec<Difference> {
        differences(&self.alike, &theirs.alike)
    }
}

fn differences(
    ours: &BTreeMap<String, String>,
    theirs: &BTreeMap<String, String>,
) -> Vec<Difference> {
    let names = ours
        .keys()
        .chain(theirs.keys().filter(|name| !ours.contains_key(*name)));
    let value = |of: &BTreeMap<String, String>, name| of.get(name).cloned();
    names
        .filter(|name| ours.get(*name) != theirs.get(*name))
        .map(|name| Difference {
            name: name.clone(),
            ours: value(ours, name).unwrap_or_else(|| "unknown".to_owned()),
            theirs: value(theirs, name).unwrap_or_else(|| "unknown".to_owned()),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named_with_both_values() {
        let print = |pairs: &[(&str, &str)]| Fingerprint {
            equal: pairs
                .iter()
                .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
                .collect(),
            alike: BTreeMap::new(),
        };
        let ours = print(&[("a", "1"), ("b", "2")]);
        assert!(ours.differences(&ours).is_empty());
        let found = ours.differences(&print(&[("a", "1"), ("b", "3"), ("c", "4")]));
        let texts: Vec<String> = found.iter().map(Difference::to_string).collect();
        assert_eq!(
            texts,
            ["b is 2 here and 3 there", "c is unknown here and 4 there"]
        );
    }
}
