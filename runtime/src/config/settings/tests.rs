use volley_models::{
    Activation, Architecture, FfnKind, LayerSpec, Norm, Rope, RopeScaling, SpecialTokens,
};

use super::super::FlagValues;
use super::*;
use crate::config::keys::Key;

/// 2 layers, 2 KV heads of width 8: a token takes 2 * 2 * 2 * 8 * 4 = 256 bytes of KV cache in f32, a block of 16 takes 4 KiB.
fn spec() -> ModelSpec {
    ModelSpec {
        architecture: Architecture::Mixtral,
        hidden: 32,
        vocab: 100,
        max_positions: 1000,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        experts: 4,
        top_k: 2,
        expert_hidden: 16,
        normalize_top_k: true,
        layers: vec![
            LayerSpec {
                ffn: FfnKind::Experts
            };
            2
        ],
        norm: Norm::Rms { eps: 1e-5 },
        rope: Rope {
            theta: 10_000.0,
            scaling: RopeScaling::None,
        },
        qk_norm: false,
        clip_qkv: None,
        attention_bias: false,
        sliding_window: None,
        activation: Activation::Silu,
        tied_embeddings: false,
        special: SpecialTokens::default(),
        stored_as: None,
    }
}

fn raw(flags: &[(&'static str, &str)]) -> Raw {
    let mut values = FlagValues::default();
    for (key, value) in flags {
        // Keys without a flag come from the file; a command's own default is as good.
        match keys::find(key).and_then(|key| key.flag) {
            Some(_) => values.set(key, Some(value)),
            None => values.set_default(key, value),
        }
    }
    Raw::load(None, [], &values).unwrap()
}

fn resolve(
    flags: &[(&'static str, &str)],
    available: u64,
    demand: Demand,
) -> Result<Settings, ConfigError> {
    Settings::resolve(&raw(flags), &spec(), "tiny", Some(available), demand)
}

const PLENTY: u64 = 1 << 40;

#[test]
fn defaults_follow_from_the_model() {
    let settings = resolve(&[], PLENTY, Demand::Serving).unwrap();
    assert_eq!(settings.model.name, "tiny");
    let cluster = settings.cluster;
    assert_eq!((cluster.context, cluster.dtype), (1000, ComputeType::F32));
    assert_eq!((cluster.max_rows, cluster.prefill_tokens), (512, 256));
    // 63 blocks hold 1000 tokens.
    assert_eq!(u64::from(cluster.kv_blocks), KV_CONTEXTS_AUTO * 63);
    assert_eq!(cluster.timeline_spans, SERVING_SPANS_AUTO);
}

#[test]
fn experts_get_sixteen_rows_of_a_micro_batch_from_all_attention_workers_together() {
    let spec = spec();
    let rows = |flags: &[(&'static str, &str)]| {
        let settings = resolve(flags, PLENTY, Demand::Serving).unwrap();
        settings.cluster.micro_batch_rows as usize
    };
    assert_eq!(rows(&[]) * spec.top_k, 16 * spec.experts);
    assert_eq!(2 * rows(&[("cluster.attention_workers", "2")]), rows(&[]));
    assert_eq!(rows(&[("cluster.micro_batch_rows", "5")]), 5);
}

#[test]
fn a_long_context_is_capped_unless_asked_for() {
    let mut spec = spec();
    spec.max_positions = 131_072;
    let resolve = |raw| {
        Settings::resolve(&raw, &spec, "", Some(PLENTY), Demand::Serving)
            .unwrap()
            .cluster
            .context
    };
    assert_eq!(resolve(raw(&[])), CONTEXT_AUTO_MAX);
    assert_eq!(resolve(raw(&[("limits.max_context", "100000")])), 100_000);
}

#[test]
fn an_automatic_cache_takes_a_quarter_of_memory_at_most_over_all_workers() {
    let available = 4 * 2 * 100 * 4096;
    let settings = resolve(
        &[("cluster.attention_workers", "2")],
        available,
        Demand::Serving,
    )
    .unwrap();
    assert_eq!(settings.cluster.kv_blocks, 100);
}

#[test]
fn an_offline_load_gets_what_it_needs() {
    let demand = Demand::Batch {
        sequences: 128,
        tokens: 100,
    };
    let settings = resolve(&[("cluster.attention_workers", "2")], PLENTY, demand).unwrap();
    assert_eq!(settings.cluster.kv_blocks, 64 * 7);
    let one = Demand::Batch {
        sequences: 1,
        tokens: 10,
    };
    assert_eq!(resolve(&[], PLENTY, one).unwrap().cluster.kv_blocks, 63);
}

#[test]
fn a_cache_too_small_for_one_sequence_is_refused_with_the_arithmetic() {
    let error = resolve(
        &[("limits.kv_cache_memory", "64KiB")],
        PLENTY,
        Demand::Serving,
    )
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "the configuration was refused: `limits.kv_cache_memory` is 64 KiB, which holds 16 blocks of 4 KiB; one sequence of 1000 tokens \
         needs 63 (252 KiB). Lower `limits.max_context` or give more memory"
    );
    assert!(
        resolve(&[], 4096, Demand::Serving)
            .unwrap_err()
            .to_string()
            .contains("a quarter of the 4 KiB available")
    );
}

#[test]
fn contradictions_with_the_model_come_together() {
    let flags = [
        ("cluster.expert_workers", "5"),
        ("limits.max_context", "1001"),
    ];
    let problems = resolve(&flags, PLENTY, Demand::Serving)
        .unwrap_err()
        .problems;
    let keys: Vec<_> = problems
        .iter()
        .map(|problem| problem.key.as_str())
        .collect();
    assert_eq!(keys, ["cluster.expert_workers", "limits.max_context"]);
}

#[test]
fn the_printed_configuration_means_the_same() {
    let flags = [
        ("model.path", "/models/some \"model\""),
        ("model.load_format", "dummy"),
        ("model.quantize", "q4"),
        ("server.api_key_file", "/key"),
        ("cluster.isolate", "host"),
        ("cluster.transport", "rdma"),
        ("rdma.rails", "mlx5_0, mlx5_1:2"),
        ("rdma.mtu", "1024"),
        ("rdma.pages", "reserved"),
        ("rdma.known_anomalies", "known.json"),
        ("rdma.anomalies", "avoid"),
        ("network.listen", "0.0.0.0:7601"),
        ("network.certificates", "certs/worker"),
        ("membership.backend", "etcd"),
        ("membership.ca", "etcd.pem"),
        ("membership.token_file", "token"),
        ("trace.file", "t.json"),
        ("limits.kv_cache_memory", "1000001"),
        ("log.format", "json"),
    ];
    let fair = [
        ("scheduler.policy", "fair-share"),
        ("scheduler.weights", "*=2,batch=0.25"),
    ];
    let urgent = [
        ("scheduler.policy", "earliest-deadline"),
        ("scheduler.classes", "10=0.5,0=5"),
        ("scheduler.pace_s", "0.05"),
    ];
    let mut printed_keys = Vec::new();
    for policy in [&fair[..], &urgent] {
        let flags = [&flags[..], policy].concat();
        let settings = resolve(&flags, PLENTY, Demand::Serving).unwrap();
        let printed = settings.to_toml(&spec());
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &printed).unwrap();
        let raw = Raw::load(Some(file.path()), [], &FlagValues::default()).unwrap();
        let again = Settings::resolve(&raw, &spec(), "other", Some(1), Demand::Serving).unwrap();
        assert_eq!(again, settings);
        let set = |key: &&Key| settings.value(key.path, &spec()).is_some();
        printed_keys.extend(keys::KEYS.iter().filter(set).map(|key| key.path));
    }
    // Nothing is left out: every key that is set has a value.
    for key in keys::KEYS {
        assert!(
            printed_keys.contains(&key.path),
            "{} is not printed",
            key.path
        );
    }
}

#[test]
fn the_manual_and_the_table_agree() {
    let manual = include_str!("../../../../docs/configuration.md");
    let tables = keys::markdown();
    assert!(
        manual.contains(tables.trim_end()),
        "docs/configuration.md is out of date; between its marks it must say:\n{tables}"
    );
}
