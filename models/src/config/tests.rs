//! What each key means, wherever our reading could differ from transformers', and what is refused.

use proptest::prelude::*;
use serde_json::json;

use super::{limits::*, *};
use crate::{FfnKind, Norm, Rope, RopeScaling};

/// The spec of a configuration that consists of a family and the keys of `with`.
fn read(model_type: &str, with: Value) -> Result<ModelSpec, ConfigError> {
    let mut config = json!({ "model_type": model_type });
    for (key, value) in with.as_object().unwrap() {
        config[key] = value.clone();
    }
    parse_config(config.to_string().as_bytes(), None).map(|(spec, _)| spec)
}

fn mixtral(with: Value) -> ModelSpec {
    read("mixtral", with).unwrap()
}

fn qwen(with: Value) -> ModelSpec {
    read("qwen3_moe", with).unwrap()
}

fn dbrx(with: Value) -> ModelSpec {
    read("dbrx", with).unwrap()
}

/// The key that a refusal names.
fn refused(model_type: &str, with: Value) -> String {
    match read(model_type, with.clone()) {
        Err(
            ConfigError::Value { key, .. }
            | ConfigError::Unsupported { key, .. }
            | ConfigError::Missing { key, .. },
        ) => key,
        other => panic!("{with}: {other:?}"),
    }
}

/// The sentence of a refusal of values that do not go together.
fn contradiction(model_type: &str, with: Value) -> String {
    match read(model_type, with.clone()) {
        Err(ConfigError::Contradiction { what, .. }) => what,
        other => panic!("{with}: {other:?}"),
    }
}

#[test]
fn absent_keys_have_transformers_defaults() {
    let spec = mixtral(json!({}));
    assert_eq!(
        (spec.hidden, spec.expert_hidden, spec.vocab),
        (4096, 14336, 32000)
    );
    assert_eq!((spec.heads, spec.kv_heads, spec.head_dim), (32, 8, 128));
    assert_eq!((spec.layers.len(), spec.experts, spec.top_k), (32, 8, 2));
    assert_eq!((spec.max_positions, spec.sliding_window), (131_072, None));
    assert_eq!(spec.norm, Norm::Rms { eps: 1e-5 });
    assert_eq!(
        spec.rope,
        Rope {
            theta: 1e6,
            scaling: RopeScaling::None
        }
    );
    assert_eq!((spec.special.bos, spec.special.eos), (Some(1), vec![2]));
    assert!(spec.normalize_top_k && !spec.tied_embeddings && !spec.qk_norm);

    let spec = qwen(json!({}));
    assert_eq!(
        (spec.hidden, spec.expert_hidden, spec.vocab),
        (2048, 768, 151_936)
    );
    // No default head_dim of its own: hidden / heads.
    assert_eq!((spec.heads, spec.kv_heads, spec.head_dim), (32, 4, 64));
    assert_eq!((spec.layers.len(), spec.experts, spec.top_k), (24, 128, 8));
    assert_eq!((spec.max_positions, spec.sliding_window), (32_768, None));
    assert_eq!(spec.norm, Norm::Rms { eps: 1e-6 });
    assert_eq!(
        spec.rope,
        Rope {
            theta: 1e4,
            scaling: RopeScaling::None
        }
    );
    assert_eq!(
        (spec.special.bos, spec.special.eos.as_slice()),
        (None, &[][..])
    );
    assert!(!spec.normalize_top_k && spec.qk_norm && !spec.attention_bias);

    let spec = dbrx(json!({}));
    assert_eq!(
        (spec.hidden, spec.expert_hidden, spec.vocab),
        (2048, 3584, 32000)
    );
    assert_eq!((spec.heads, spec.kv_heads, spec.head_dim), (16, 1, 128));
    assert_eq!((spec.layers.len(), spec.experts, spec.top_k), (24, 4, 1));
    assert_eq!((spec.max_positions, spec.clip_qkv), (2048, None));
    assert_eq!(spec.norm, Norm::Layer { eps: 1e-5 });
    assert_eq!(
        spec.rope,
        Rope {
            theta: 1e4,
            scaling: RopeScaling::None
        }
    );
    assert!(spec.normalize_top_k);
}

#[test]
fn the_family_is_the_model_type_and_the_class_has_to_agree() {
    let parse = |config: Value| parse_config(config.to_string().as_bytes(), None);
    let by_class = parse(json!({"architectures": ["Qwen3MoeForCausalLM"]}))
        .unwrap()
        .0;
    assert_eq!(by_class.architecture, Architecture::Qwen3Moe);
    assert_eq!(
        mixtral(json!({"architectures": null})).architecture,
        Architecture::Mixtral
    );
    assert_eq!(
        refused(
            "mixtral",
            json!({"architectures": ["MixtralForSequenceClassification"]})
        ),
        "architectures"
    );
    assert_eq!(
        refused("mixtral", json!({"architectures": ["DbrxForCausalLM"]})),
        "architectures"
    );
    assert_eq!(refused("llama", json!({})), "model_type");
    let error = read("llama", json!({})).unwrap_err().to_string();
    assert!(
        error.contains("config.json: `model_type` is \"llama\"") && error.contains("qwen3_moe"),
        "{error}"
    );
    assert!(matches!(parse(json!({})), Err(ConfigError::Missing { .. })));
    assert!(matches!(parse(json!([])), Err(ConfigError::Value { .. })));
    assert!(matches!(
        parse_config(b"{", None),
        Err(ConfigError::Syntax { .. })
    ));
}

#[test]
fn heads() {
    assert_eq!(mixtral(json!({"head_dim": null})).head_dim, 128);
    assert_eq!(mixtral(json!({"head_dim": 64})).head_dim, 64);
    assert_eq!(qwen(json!({"head_dim": 128})).head_dim, 128);
    assert_eq!(mixtral(json!({"num_key_value_heads": null})).kv_heads, 32);
    assert_eq!(
        refused("qwen3_moe", json!({"num_key_value_heads": null})),
        "num_key_value_heads"
    );
    assert!(
        contradiction("mixtral", json!({"num_attention_heads": 6})).contains("does not divide")
    );
    assert_eq!(
        mixtral(json!({"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32}))
            .head_dim,
        32
    );
    assert!(contradiction("mixtral", json!({"num_key_value_heads": 5})).contains("do not divide"));
    assert!(contradiction("mixtral", json!({"head_dim": 33})).contains("even"));
    // DBRX divides whatever head_dim says.
    assert_eq!(dbrx(json!({"head_dim": 128})).head_dim, 128);
    assert_eq!(refused("dbrx", json!({"head_dim": 64})), "head_dim");
}

#[test]
fn names_of_one_number() {
    assert_eq!(mixtral(json!({"num_experts": 5})).experts, 5);
    assert_eq!(qwen(json!({"num_local_experts": 16})).experts, 16);
    assert_eq!(
        qwen(json!({"num_local_experts": 16, "num_experts": 16})).experts,
        16
    );
    assert!(
        contradiction(
            "qwen3_moe",
            json!({"num_local_experts": 16, "num_experts": 32})
        )
        .contains("two names")
    );
    let spec = dbrx(
        json!({"hidden_size": 256, "num_attention_heads": 8, "num_hidden_layers": 3, "max_position_embeddings": 77}),
    );
    assert_eq!(
        (
            spec.hidden,
            spec.heads,
            spec.layers.len(),
            spec.max_positions
        ),
        (256, 8, 3, 77)
    );
}

#[test]
fn rotary_base_comes_from_the_nearest_place() {
    let theta = |spec: ModelSpec| spec.rope.theta;
    assert_eq!(theta(mixtral(json!({"rope_theta": 5e5}))), 5e5);
    assert_eq!(theta(mixtral(json!({"rope_theta": null}))), 1e6);
    assert_eq!(
        theta(mixtral(
            json!({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}})
        )),
        2e4
    );
    assert_eq!(
        theta(mixtral(
            json!({"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}})
        )),
        5e5
    );
    assert_eq!(
        theta(mixtral(json!({"rope_theta": 5e5, "rope_parameters": {}}))),
        5e5
    );
    // rope_scaling, if not empty, stands in for rope_parameters altogether.
    let both = json!({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_theta": 2e4}});
    assert_eq!(
        mixtral(both).rope,
        Rope {
            theta: 1e6,
            scaling: RopeScaling::Linear { factor: 2.0 }
        }
    );
    let empty = json!({"rope_scaling": {}, "rope_parameters": {"rope_theta": 2e4}});
    assert_eq!(theta(mixtral(empty)), 2e4);
}

#[test]
fn dbrx_finds_its_base_in_attn_config_where_transformers_five_does_not_look() {
    let attn = json!({"rope_theta": 500_000, "kv_n_heads": 4});
    assert_eq!(dbrx(json!({"attn_config": attn})).rope.theta, 5e5);
    assert_eq!(
        dbrx(json!({"attn_config": attn, "rope_theta": 3e4}))
            .rope
            .theta,
        3e4
    );
    assert_eq!(
        dbrx(json!({"attn_config": attn, "rope_parameters": {"rope_theta": 2e4}}))
            .rope
            .theta,
        2e4
    );
}

#[test]
fn rotary_scaling() {
    let scaling = |value: Value| {
        mixtral(json!({"max_position_embeddings": 8192, "rope_scaling": value}))
            .rope
            .scaling
    };
    assert_eq!(scaling(json!(null)), RopeScaling::None);
    assert_eq!(scaling(json!({"rope_type": "default"})), RopeScaling::None);
    assert_eq!(
        scaling(json!({"rope_type": "linear", "type": "yarn", "factor": 4})),
        RopeScaling::Linear { factor: 4.0 }
    );
    let llama3 = json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": 4096});
    assert_eq!(
        scaling(llama3.clone()),
        RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_positions: 4096
        }
    );
    let yarn = |value: Value| match scaling(value) {
        RopeScaling::Yarn {
            factor,
            beta_fast,
            beta_slow,
            attention_factor,
            original_positions,
        } => (
            factor,
            beta_fast,
            beta_slow,
            attention_factor,
            original_positions,
        ),
        other => panic!("{other:?}"),
    };
    let implied = 0.1 * 4f64.ln() + 1.0;
    assert_eq!(
        yarn(json!({"type": "yarn", "factor": 4.0})),
        (4.0, 32.0, 1.0, implied, 8192)
    );
    assert_eq!(
        yarn(
            json!({"type": "yarn", "factor": null, "original_max_position_embeddings": 2048, "beta_fast": 0, "beta_slow": 2})
        ),
        (4.0, 32.0, 2.0, implied, 2048)
    );
    assert_eq!(
        yarn(json!({"type": "yarn", "factor": 4, "attention_factor": 1.5})).3,
        1.5
    );
    assert_eq!(
        yarn(json!({"type": "yarn", "factor": 4, "mscale": 0.5})).3,
        implied
    );
    let ratio = (0.1 * 0.5 * 4f64.ln() + 1.0) / (0.1 * 2.0 * 4f64.ln() + 1.0);
    assert_eq!(
        yarn(json!({"type": "yarn", "factor": 4, "mscale": 0.5, "mscale_all_dim": 2})).3,
        ratio
    );
    // The top level wins for the trained context, as in Phi-3.
    let top = json!({"original_max_position_embeddings": 1024, "rope_parameters": llama3});
    assert!(matches!(
        mixtral(top).rope.scaling,
        RopeScaling::Llama3 {
            original_positions: 1024,
            ..
        }
    ));

    for (value, key) in [
        (
            json!({"rope_type": "dynamic", "factor": 2}),
            "rope_scaling.rope_type",
        ),
        (json!({"type": "su"}), "rope_scaling.type"),
        (json!({"type": "linear"}), "rope_scaling.factor"),
        (
            json!({"type": "linear", "factor": 0}),
            "rope_scaling.factor",
        ),
        (
            json!({"type": "yarn", "factor": 2, "truncate": false}),
            "rope_scaling.truncate",
        ),
        (json!({"type": "yarn"}), "rope_scaling.factor"),
        (
            json!({"type": "llama3", "factor": 2, "low_freq_factor": 1}),
            "rope_scaling.high_freq_factor",
        ),
        (
            json!({"type": "default", "partial_rotary_factor": 0.5}),
            "rope_scaling.partial_rotary_factor",
        ),
        (json!({"type": 3}), "rope_scaling.type"),
        (json!([1]), "rope_scaling"),
    ] {
        assert_eq!(refused("mixtral", json!({"rope_scaling": value})), key);
    }
    assert_eq!(refused("mixtral", json!({"rope_theta": 1.0})), "rope_theta");
    assert_eq!(
        refused("mixtral", json!({"partial_rotary_factor": 0.25})),
        "partial_rotary_factor"
    );
    let crossed =
        json!({"type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 4});
    assert!(contradiction("mixtral", json!({"rope_scaling": crossed})).contains("not above"));
}

#[test]
fn sliding_windows() {
    assert_eq!(
        mixtral(json!({"sliding_window": 4096})).sliding_window,
        Some(4096)
    );
    assert_eq!(
        mixtral(json!({"sliding_window": 4096, "use_sliding_window": false})).sliding_window,
        Some(4096)
    );
    assert_eq!(
        refused("mixtral", json!({"sliding_window": 0})),
        "sliding_window"
    );
    assert_eq!(qwen(json!({"sliding_window": 4096})).sliding_window, None);
    assert_eq!(
        qwen(json!({"use_sliding_window": true})).sliding_window,
        Some(4096)
    );
    assert_eq!(
        qwen(json!({"use_sliding_window": true, "sliding_window": null})).sliding_window,
        None
    );
    let windowed =
        json!({"use_sliding_window": true, "sliding_window": 99, "max_window_layers": 24});
    assert_eq!(qwen(windowed).sliding_window, Some(99));
}

#[test]
fn dense_layers() {
    let dense = |with: Value| {
        let spec = qwen(with);
        let layers = spec.layers.iter().enumerate();
        layers
            .filter(|(_, layer)| layer.ffn != FfnKind::Experts)
            .map(|(i, _)| i)
            .collect::<Vec<_>>()
    };
    assert_eq!(dense(json!({"num_hidden_layers": 4})), [0usize; 0]);
    assert_eq!(
        dense(json!({"num_hidden_layers": 4, "mlp_only_layers": [0, 3, 9, -1]})),
        [0, 3]
    );
    assert_eq!(
        dense(json!({"num_hidden_layers": 4, "decoder_sparse_step": 2})),
        [0, 2]
    );
    assert_eq!(
        dense(json!({"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]})),
        [0, 1, 2]
    );
    let spec =
        qwen(json!({"num_hidden_layers": 1, "mlp_only_layers": null, "intermediate_size": 99}));
    assert_eq!(spec.layers[0].ffn, FfnKind::Experts);
    let spec = qwen(json!({"mlp_only_layers": [0], "intermediate_size": 99}));
    assert_eq!(spec.layers[0].ffn, FfnKind::Dense { hidden: 99 });
    assert!(
        contradiction("qwen3_moe", json!({"decoder_sparse_step": 25}))
            .contains("no layer has experts")
    );
    assert_eq!(
        refused("qwen3_moe", json!({"decoder_sparse_step": 0})),
        "decoder_sparse_step"
    );
    assert_eq!(
        refused("qwen3_moe", json!({"mlp_only_layers": [0.5]})),
        "mlp_only_layers"
    );
}

#[test]
fn flags_of_one_family_are_without_effect_in_another() {
    assert!(qwen(json!({"attention_bias": true})).attention_bias);
    assert!(!mixtral(json!({"attention_bias": true})).attention_bias);
    assert!(qwen(json!({"norm_topk_prob": true})).normalize_top_k);
    assert!(mixtral(json!({"norm_topk_prob": false})).normalize_top_k);
    assert!(mixtral(json!({"tie_word_embeddings": true})).tied_embeddings);
    assert_eq!(
        refused("dbrx", json!({"tie_word_embeddings": true})),
        "tie_word_embeddings"
    );
    assert_eq!(
        refused("qwen3_moe", json!({"attention_bias": 1})),
        "attention_bias"
    );
}

#[test]
fn dbrx_sections() {
    let spec = dbrx(json!({
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8},
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4, "moe_normalize_expert_weights": null,
                       "ffn_act_fn": {"name": "silu"}},
    }));
    assert_eq!((spec.clip_qkv, spec.kv_heads), (Some(8.0), 8));
    assert_eq!(
        (
            spec.expert_hidden,
            spec.experts,
            spec.top_k,
            spec.normalize_top_k
        ),
        (10752, 16, 4, false)
    );
    assert_eq!(
        dbrx(json!({"attn_config": null, "ffn_config": null})).experts,
        4
    );
    let ffn = |value: Value| refused("dbrx", json!({ "ffn_config": value }));
    assert_eq!(
        ffn(json!({"moe_normalize_expert_weights": 2.0})),
        "ffn_config.moe_normalize_expert_weights"
    );
    assert_eq!(
        ffn(json!({"ffn_act_fn": {"name": "gelu"}})),
        "ffn_config.ffn_act_fn.name"
    );
    assert_eq!(
        ffn(json!({"moe_num_experts": 0})),
        "ffn_config.moe_num_experts"
    );
    assert_eq!(
        refused("dbrx", json!({"attn_config": {"clip_qkv": 0}})),
        "attn_config.clip_qkv"
    );
    assert_eq!(refused("dbrx", json!({"attn_config": 3})), "attn_config");
}

#[test]
fn special_tokens_of_the_generation_config_win() {
    let special = |config: Value, generation: Option<Value>| {
        let generation = generation.map(|value| value.to_string().into_bytes());
        let config = config.to_string().into_bytes();
        parse_config(&config, generation.as_deref())
            .unwrap()
            .0
            .special
    };
    let config = json!({"model_type": "mixtral", "bos_token_id": 5, "eos_token_id": [6, 7]});
    let as_read = special(config.clone(), None);
    assert_eq!((as_read.bos, as_read.eos), (Some(5), vec![6, 7]));
    let over = special(config.clone(), Some(json!({"eos_token_id": 9})));
    assert_eq!((over.bos, over.eos), (Some(5), vec![9]));
    let none = special(
        json!({"model_type": "mixtral", "bos_token_id": null, "eos_token_id": null}),
        None,
    );
    assert_eq!((none.bos, none.eos), (None, vec![]));
    for bad in [
        json!(-1),
        json!(1.5),
        json!("2"),
        json!([1, null]),
        json!(1u64 << 32),
    ] {
        assert_eq!(
            refused("mixtral", json!({"eos_token_id": bad})),
            "eos_token_id"
        );
    }
}

#[test]
fn generation_defaults() {
    let parse = |generation: Value| {
        parse_config(
            br#"{"model_type": "mixtral"}"#,
            Some(generation.to_string().as_bytes()),
        )
        .map(|read| read.1)
    };
    let read = parse(json!({"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "repetition_penalty": null})).unwrap();
    assert_eq!(
        read,
        GenerationDefaults {
            do_sample: Some(true),
            temperature: Some(0.6),
            top_p: Some(0.95),
            top_k: Some(20),
            repetition_penalty: None
        }
    );
    assert_eq!(parse(json!({})).unwrap(), GenerationDefaults::default());
    for bad in [
        json!({"temperature": -1}),
        json!({"top_p": 0}),
        json!({"top_p": 1.1}),
        json!({"top_k": -1}),
        json!({"do_sample": "yes"}),
        json!({"repetition_penalty": 0}),
    ] {
        match parse(bad.clone()) {
            Err(ConfigError::Value { file, .. }) => assert_eq!(file, "generation_config.json"),
            other => panic!("{bad}: {other:?}"),
        }
    }
}

#[test]
fn element_types() {
    let stored = |with: Value| mixtral(with).stored_as;
    assert_eq!(stored(json!({})), None);
    assert_eq!(
        stored(json!({"torch_dtype": "bfloat16"})),
        Some(ElementType::Bf16)
    );
    assert_eq!(
        stored(json!({"dtype": "float16", "torch_dtype": "bfloat16"})),
        Some(ElementType::F16)
    );
    assert_eq!(
        stored(json!({"dtype": null, "torch_dtype": "torch.float32"})),
        Some(ElementType::F32)
    );
    assert_eq!(stored(json!({"dtype": "auto"})), None);
    assert_eq!(
        refused("mixtral", json!({"dtype": "float8_e4m3fn"})),
        "dtype"
    );
}

#[test]
fn what_is_not_run_is_refused_by_name() {
    assert_eq!(
        refused("mixtral", json!({"hidden_act": "gelu"})),
        "hidden_act"
    );
    assert_eq!(
        refused("mixtral", json!({"hidden_act": null})),
        "hidden_act"
    );
    mixtral(json!({"hidden_act": "swish"}));
    assert_eq!(
        refused(
            "mixtral",
            json!({"quantization_config": {"quant_method": "fp8"}})
        ),
        "quantization_config"
    );
    mixtral(json!({"quantization_config": null}));
}

#[test]
fn sizes_are_bounded() {
    for bad in [
        json!(0),
        json!(-1),
        json!(1.0),
        json!("4"),
        json!(null),
        json!(true),
        json!([]),
        json!(u64::MAX),
        json!(1e300),
    ] {
        for key in [
            "hidden_size",
            "vocab_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_experts_per_tok",
            "num_local_experts",
            "intermediate_size",
            "max_position_embeddings",
        ] {
            assert_eq!(refused("mixtral", json!({key: bad.clone()})), key, "{bad}");
        }
    }
    for (key, max) in [
        ("hidden_size", WIDTH_MAX),
        ("vocab_size", VOCAB_MAX),
        ("num_hidden_layers", LAYERS_MAX),
        ("num_attention_heads", HEADS_MAX),
        ("head_dim", HEAD_DIM_MAX),
        ("num_local_experts", EXPERTS_MAX),
        ("max_position_embeddings", POSITIONS_MAX),
    ] {
        assert_eq!(refused("mixtral", json!({key: max + 1})), key);
    }
    for bad in [
        json!(0),
        json!(-1e-5),
        json!(1),
        json!("1e-5"),
        json!(null),
        json!(1e-60),
    ] {
        assert_eq!(
            refused("mixtral", json!({"rms_norm_eps": bad})),
            "rms_norm_eps"
        );
    }
    assert!(contradiction("mixtral", json!({"num_experts_per_tok": 9})).contains("only 8"));
    let huge = json!({"hidden_size": WIDTH_MAX, "intermediate_size": WIDTH_MAX, "num_local_experts": EXPERTS_MAX,
        "num_hidden_layers": LAYERS_MAX, "num_attention_heads": HEADS_MAX, "num_key_value_heads": HEADS_MAX});
    assert!(contradiction("mixtral", huge).contains("bytes of weights"));
}

const SAMPLES: [&str; 4] = [
    include_str!("../../../integration/fixtures/models/tiny-mixtral/config.json"),
    include_str!("../../../integration/fixtures/models/tiny-qwen3moe/config.json"),
    include_str!("../../../integration/fixtures/models/tiny-dbrx/config.json"),
    r#"{"model_type": "qwen3_moe", "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0,
        "original_max_position_embeddings": 4096}, "mlp_only_layers": [0, 2], "eos_token_id": [1, 2]}"#,
];

fn awkward() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!(null)),
        Just(json!(0)),
        Just(json!(-1)),
        Just(json!(1)),
        Just(json!(true)),
        Just(json!("")),
        Just(json!([])),
        Just(json!({})),
        Just(json!([[null]])),
        any::<u64>().prop_map(|n| json!(n)),
        (0u32..40).prop_map(|bits| json!(1u64 << bits)),
        any::<f64>().prop_map(|n| json!(n)),
        "\\PC{0,8}".prop_map(|s| json!(s)),
    ]
}

/// Replaces the value at the `at`-th place of a walk over the whole document.
fn replace(value: &mut Value, at: &mut usize, with: &Value) {
    if *at == 0 {
        *value = with.clone();
    }
    *at = at.wrapping_sub(1);
    match value {
        Value::Object(map) => map.values_mut().for_each(|inner| replace(inner, at, with)),
        Value::Array(items) => items.iter_mut().for_each(|inner| replace(inner, at, with)),
        _ => {}
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn no_values_make_it_panic(
        sample in 0..SAMPLES.len(), changes in prop::collection::vec((0usize..45, awkward()), 1..4)
    ) {
        let mut config: Value = serde_json::from_str(SAMPLES[sample]).unwrap();
        for (mut at, with) in changes {
            replace(&mut config, &mut at, &with);
        }
        crate::fuzz::config(config.to_string().as_bytes());
    }

    #[test]
    fn no_bytes_make_it_panic(
        sample in 0..SAMPLES.len(), changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8), cut: prop::sample::Index
    ) {
        let mut config = SAMPLES[sample].as_bytes().to_vec();
        for (at, byte) in changes {
            let at = at.index(config.len());
            config[at] = byte;
        }
        crate::fuzz::config(&config);
        crate::fuzz::config(&config[..cut.index(config.len())]);
    }
}
