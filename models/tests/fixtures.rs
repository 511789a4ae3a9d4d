//! The tiny models of `integration/fixtures`, as the Python script `make_models.py` wrote them.

use std::{fs, path::PathBuf, sync::Arc};

use safetensors::SafeTensors;
use serde_json::Value;
use volley_models::{
    ChatMessage, ChatOptions, DenseTensor, ElementType, ExpertTensor, LoadFormat, ModelDir,
    ModelParts, TensorId,
};

const NAMES: [&str; 3] = ["tiny-mixtral", "tiny-qwen3moe", "tiny-dbrx"];

fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../integration/fixtures")
}

fn open(name: &str) -> ModelDir {
    ModelDir::open(fixtures().join("models").join(name), LoadFormat::Auto).unwrap()
}

#[test]
fn every_tensor_of_every_fixture_has_its_shape() {
    for name in NAMES {
        let model = open(name);
        assert_eq!(model.name(), name);
        let weights = model.weights();
        for id in TensorId::all(model.spec()) {
            let view = weights.tensor(id).unwrap();
            assert_eq!(
                Some((view.rows, view.cols)),
                id.shape(model.spec()),
                "{name} {id:?}"
            );
            assert_eq!(view.element, ElementType::Bf16);
            let values = view.to_f32();
            assert_eq!(values.len(), view.rows * view.cols);
            assert!(
                values.iter().any(|&value| value != values[0]),
                "{name} {id:?}"
            );
        }
    }
}

/// Rows of a stored tensor, widened.
fn stored(name: &str, tensor: &str) -> Vec<Vec<f32>> {
    let bytes = fs::read(
        fixtures()
            .join("models")
            .join(name)
            .join("model.safetensors"),
    )
    .unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor(tensor).unwrap();
    let values: Vec<f32> = view
        .data()
        .chunks_exact(2)
        .map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32())
        .collect();
    values
        .chunks_exact(*view.shape().last().unwrap())
        .map(<[f32]>::to_vec)
        .collect()
}

/// Rows of a role's matrix.
fn read(model: &ModelDir, id: TensorId) -> Vec<Vec<f32>> {
    let weights = model.weights();
    let view = weights.tensor(id).unwrap();
    let values = view.to_f32();
    values
        .chunks_exact(view.cols)
        .map(<[f32]>::to_vec)
        .collect()
}

fn transposed(rows: &[Vec<f32>]) -> Vec<Vec<f32>> {
    (0..rows[0].len())
        .map(|column| rows.iter().map(|row| row[column]).collect())
        .collect()
}

#[test]
fn roles_are_the_tensors_they_stand_for() {
    use DenseTensor::*;
    use ExpertTensor::*;

    let model = open("tiny-mixtral");
    let expert = |which| read(&model, TensorId::Expert(1, 3, which));
    let name = |of: &str| format!("model.layers.1.block_sparse_moe.experts.3.{of}.weight");
    assert_eq!(expert(Gate), stored("tiny-mixtral", &name("w1")));
    assert_eq!(expert(Up), stored("tiny-mixtral", &name("w3")));
    assert_eq!(expert(Down), stored("tiny-mixtral", &name("w2")));

    let model = open("tiny-qwen3moe");
    let name = |of: &str| format!("model.layers.1.{of}.weight");
    assert_eq!(
        read(&model, TensorId::Dense(1, KeyNorm)),
        stored("tiny-qwen3moe", &name("self_attn.k_norm"))
    );
    assert_eq!(
        read(&model, TensorId::Dense(1, Router)),
        stored("tiny-qwen3moe", &name("mlp.gate"))
    );
    assert_eq!(
        read(&model, TensorId::Expert(1, 15, Up)),
        stored("tiny-qwen3moe", &name("mlp.experts.15.up_proj"))
    );

    // 4 query heads and 2 key/value heads of 32; experts of 96 rows.
    let model = open("tiny-dbrx");
    let dense = |which| read(&model, TensorId::Dense(1, which));
    let fused = stored(
        "tiny-dbrx",
        "transformer.blocks.1.norm_attn_norm.attn.Wqkv.weight",
    );
    assert_eq!(dense(Query), fused[..128]);
    assert_eq!(dense(Key), fused[128..192]);
    assert_eq!(dense(Value), fused[192..]);
    let expert = |which| read(&model, TensorId::Expert(1, 2, which));
    let rows = |of: &str| {
        stored(
            "tiny-dbrx",
            &format!("transformer.blocks.1.ffn.experts.mlp.{of}"),
        )[192..288]
            .to_vec()
    };
    assert_eq!(expert(Gate), rows("w1"));
    assert_eq!(expert(Up), rows("v1"));
    assert_eq!(expert(Down), transposed(&rows("w2")));
}

#[test]
fn prompts_have_the_ids_that_the_golden_files_have() {
    for name in NAMES {
        let tokenizer = open(name).tokenizer().unwrap();
        let golden = fs::read_to_string(fixtures().join(format!("golden/{name}.json"))).unwrap();
        let records: Vec<serde_json::Value> = serde_json::from_str(&golden).unwrap();
        assert_eq!(records.len(), 4);
        for record in records {
            let prompt = record["prompt"].as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(record["prompt_ids"].clone()).unwrap();
            // add_bos_token is false, so adding special tokens adds none.
            assert_eq!(
                tokenizer.encode(prompt, true).unwrap(),
                ids,
                "{name} {prompt:?}"
            );
            assert_eq!(tokenizer.encode(prompt, false).unwrap(), ids);
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), prompt);
        }
    }
}

#[test]
fn the_fixtures_have_their_chat_template_and_their_defaults() {
    let model = open("tiny-mixtral");
    let text = model
        .chat_template()
        .unwrap()
        .render(
            &[ChatMessage::new("user", "Hello")],
            &ChatOptions {
                add_generation_prompt: true,
                ..ChatOptions::default()
            },
        )
        .unwrap();
    assert_eq!(
        text,
        "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    );
    let ids = model.tokenizer().unwrap().encode(&text, true).unwrap();
    assert_eq!((ids[0], ids.iter().filter(|&&id| id == 3).count()), (3, 2));
    assert_eq!(model.generation_defaults().do_sample, Some(false));
    assert_eq!(model.spec().special.eos, [2]);
}

fn parts(name: &str) -> ModelParts {
    let file = |of: &str| fs::read(fixtures().join("models").join(name).join(of)).unwrap();
    ModelParts {
        name: name.to_owned(),
        config: file("config.json").into(),
        generation_config: Some(file("generation_config.json").into()),
        tokenizer: Some(file("tokenizer.json").into()),
        tokenizer_config: Some(file("tokenizer_config.json").into()),
        chat_template: None,
        weights: file("model.safetensors").into(),
    }
}

#[test]
fn a_model_in_memory_is_the_model_on_disk() {
    let disk = open("tiny-qwen3moe");
    let memory = ModelDir::from_parts(parts("tiny-qwen3moe")).unwrap();
    assert_eq!(memory.spec(), disk.spec());
    assert_eq!(memory.content_hash().unwrap(), disk.content_hash().unwrap());
    assert_eq!(memory.generation_defaults(), disk.generation_defaults());
    let id = TensorId::Expert(0, 7, ExpertTensor::Down);
    assert_eq!(read(&memory, id), read(&disk, id));
    let ids = memory.tokenizer().unwrap().encode("ROMEO", true).unwrap();
    assert_eq!(
        disk.tokenizer().unwrap().encode("ROMEO", true).unwrap(),
        ids
    );
    assert!(memory.chat_template().is_ok());
}

#[test]
fn the_hash_tells_models_apart_and_not_copies() {
    let hash = |model: &ModelDir| model.content_hash().unwrap();
    let one = open("tiny-mixtral");
    assert_eq!(hash(&one), hash(&open("tiny-mixtral")));
    assert_ne!(hash(&one), hash(&open("tiny-qwen3moe")));
    let dummy = |seed| {
        let dir = fixtures().join("models/tiny-mixtral");
        ModelDir::open(dir, LoadFormat::Dummy { seed }).unwrap()
    };
    assert_eq!(hash(&dummy(1)), hash(&dummy(1)));
    assert_ne!(hash(&dummy(1)), hash(&dummy(2)));
    assert_ne!(hash(&dummy(1)), hash(&one));

    // One weight of a sampled tensor, as fine-tuning would change it.
    let mut tuned = parts("tiny-mixtral");
    let mut bytes = fs::read(fixtures().join("models/tiny-mixtral/model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let query = file
        .tensor("model.layers.1.self_attn.q_proj.weight")
        .unwrap();
    let at = query.data().as_ptr() as usize - bytes.as_ptr() as usize;
    bytes[at] ^= 1;
    tuned.weights = bytes.into();
    assert_ne!(hash(&ModelDir::from_parts(tuned).unwrap()), hash(&one));

    // Values in the configuration count as they are read, not as they are written.
    let mut config: Value = serde_json::from_slice(&parts("tiny-mixtral").config).unwrap();
    let with = |config: &Value| {
        let config = config.to_string().into_bytes().into();
        hash(
            &ModelDir::from_parts(ModelParts {
                config,
                ..parts("tiny-mixtral")
            })
            .unwrap(),
        )
    };
    assert_eq!(with(&config), hash(&one));
    config["rope_theta"] = serde_json::json!(10000.0);
    assert_ne!(with(&config), hash(&one));
}

#[test]
fn a_dummy_model_needs_its_configuration_only() {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(
        fixtures().join("models/tiny-dbrx/config.json"),
        dir.path().join("config.json"),
    )
    .unwrap();
    let model = ModelDir::open(dir.path(), LoadFormat::Dummy { seed: 5 }).unwrap();
    let weights: Arc<_> = model.weights();
    for id in TensorId::all(model.spec()) {
        assert!(weights.tensor(id).is_ok());
    }
    let error = model.tokenizer().unwrap_err().to_string();
    assert!(error.contains("there is no tokenizer.json"), "{error}");
    let error = model.chat_template().unwrap_err().to_string();
    assert!(error.contains("has no chat template"), "{error}");
}
