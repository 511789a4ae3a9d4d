//! Checkpoints that are laid out otherwise, and checkpoints that are broken: each in a folder of its own, each with the exact
//! kind of error.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use safetensors::{Dtype, SafeTensors, serialize, tensor::TensorView};
use serde_json::{Value, json};
use tempfile::TempDir;
use volley_models::{
    CheckpointError, ElementType, LoadFormat, ModelDir, ModelError, TensorId, WeightError,
};

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../integration/fixtures/models")
        .join(name)
}

fn tensors(name: &str) -> Tensors {
    let bytes = fs::read(fixture(name).join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter()
        .map(|(name, view)| {
            let tensor = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
            (name.to_owned(), tensor)
        })
        .collect()
}

/// A folder with the configuration of a fixture and nothing else.
fn folder(name: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::copy(
        fixture(name).join("config.json"),
        dir.path().join("config.json"),
    )
    .unwrap();
    dir
}

fn write(path: PathBuf, tensors: &Tensors) {
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        (name, TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    fs::write(path, serialize(views, None).unwrap()).unwrap();
}

/// Writes two shards and an index, and gives the index for further harm.
fn write_shards(dir: &Path, tensors: &Tensors) -> Value {
    let mut shards = [Tensors::new(), Tensors::new()];
    let mut weight_map = serde_json::Map::new();
    for (i, (name, tensor)) in tensors.iter().enumerate() {
        shards[i % 2].insert(name.clone(), tensor.clone());
        weight_map.insert(name.clone(), json!(shard(i % 2)));
    }
    for (i, tensors) in shards.iter().enumerate() {
        write(dir.join(shard(i)), tensors);
    }
    let index = json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
    write_index(dir, &index);
    index
}

fn shard(i: usize) -> String {
    format!("model-{:05}-of-00002.safetensors", i + 1)
}

fn write_index(dir: &Path, index: &Value) {
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

fn open(dir: &Path) -> Result<ModelDir, ModelError> {
    ModelDir::open(dir, LoadFormat::Auto)
}

fn refused(dir: &Path) -> CheckpointError {
    match open(dir) {
        Err(ModelError::Checkpoint(error)) => error,
        other => panic!("{other:?}"),
    }
}

/// The one problem among tensors that a refusal lists.
fn problem(dir: &Path) -> WeightError {
    match refused(dir) {
        CheckpointError::Tensors {
            mut problems,
            count: 1,
            ..
        } => problems.remove(0),
        other => panic!("{other:?}"),
    }
}

fn assert_same_weights(one: &ModelDir, other: &ModelDir) {
    let (one_weights, other_weights) = (one.weights(), other.weights());
    for id in TensorId::all(one.spec()) {
        let one = one_weights.tensor(id).unwrap().to_f32();
        assert_eq!(one, other_weights.tensor(id).unwrap().to_f32(), "{id:?}");
    }
}

#[test]
fn shards_with_and_without_an_index_are_the_single_file() {
    for name in ["tiny-mixtral", "tiny-dbrx"] {
        let single = open(&fixture(name)).unwrap();
        let dir = folder(name);
        write_shards(dir.path(), &tensors(name));
        assert_same_weights(&single, &open(dir.path()).unwrap());
        fs::remove_file(dir.path().join("model.safetensors.index.json")).unwrap();
        assert_same_weights(&single, &open(dir.path()).unwrap());
    }
}

/// What `save_pretrained(save_original_format=False)` of transformers 5 writes.
#[test]
fn stacked_experts_are_the_single_ones() {
    let layouts = [
        (
            "tiny-mixtral",
            "block_sparse_moe",
            ["w1", "w3", "w2"],
            4,
            96,
            128,
        ),
        (
            "tiny-qwen3moe",
            "mlp",
            ["gate_proj", "up_proj", "down_proj"],
            16,
            32,
            64,
        ),
    ];
    for (name, block, [gate, up, down], experts, inner, hidden) in layouts {
        let mut all = tensors(name);
        for layer in 0..2 {
            let layer = format!("model.layers.{layer}");
            let (mut gate_up, mut downs) = (Vec::new(), Vec::new());
            for expert in 0..experts {
                let mut take = |of: &str| {
                    all.remove(&format!("{layer}.{block}.experts.{expert}.{of}.weight"))
                        .unwrap()
                        .2
                };
                gate_up.extend(take(gate));
                gate_up.extend(take(up));
                downs.extend(take(down));
            }
            let router = all.remove(&format!("{layer}.{block}.gate.weight")).unwrap();
            all.insert(format!("{layer}.mlp.gate.weight"), router);
            let bf16 = |shape: [usize; 3], data| (Dtype::BF16, shape.to_vec(), data);
            all.insert(
                format!("{layer}.mlp.experts.gate_up_proj"),
                bf16([experts, 2 * inner, hidden], gate_up),
            );
            all.insert(
                format!("{layer}.mlp.experts.down_proj"),
                bf16([experts, hidden, inner], downs),
            );
        }
        let dir = folder(name);
        write(dir.path().join("model.safetensors"), &all);
        assert_same_weights(&open(&fixture(name)).unwrap(), &open(dir.path()).unwrap());
    }
}

#[test]
fn tied_embeddings_need_one_of_the_two() {
    let dir = folder("tiny-mixtral");
    let config = fs::read_to_string(dir.path().join("config.json")).unwrap();
    let tied = config.replace(
        "\"tie_word_embeddings\": false",
        "\"tie_word_embeddings\": true",
    );
    assert_ne!(config, tied);
    fs::write(dir.path().join("config.json"), tied).unwrap();
    let both = tensors("tiny-mixtral");
    let read = |all: &Tensors| {
        write(dir.path().join("model.safetensors"), all);
        let weights = open(dir.path()).unwrap().weights();
        let values = |id| weights.tensor(id).unwrap().to_f32();
        (values(TensorId::Embedding), values(TensorId::Head))
    };
    for one in ["lm_head.weight", "model.embed_tokens.weight"] {
        let mut all = both.clone();
        all.remove(one).unwrap();
        let (embedding, head) = read(&all);
        assert_eq!(embedding, head);
    }
    // Both are there and differ: transformers 5 does not tie them.
    let (embedding, head) = read(&both);
    assert_ne!(embedding, head);
}

#[test]
fn missing_files() {
    let dir = folder("tiny-mixtral");
    assert!(matches!(
        refused(dir.path()),
        CheckpointError::NoWeights { .. }
    ));
    fs::write(dir.path().join("pytorch_model.bin"), b"x").unwrap();
    assert!(matches!(
        refused(dir.path()),
        CheckpointError::NoWeights { .. }
    ));
    match open(&dir.path().join("nowhere")) {
        Err(ModelError::Io { file, .. }) => assert!(file.ends_with("config.json"), "{file}"),
        other => panic!("{other:?}"),
    }
    let empty = tempfile::tempdir().unwrap();
    match open(empty.path()) {
        Err(error @ ModelError::Io { .. }) => {
            assert!(
                error.to_string().contains("Hugging Face model directory"),
                "{error}"
            );
        }
        other => panic!("{other:?}"),
    }
    fs::create_dir(dir.path().join("model.safetensors")).unwrap();
    assert!(matches!(
        refused(dir.path()),
        CheckpointError::NotAFile { .. }
    ));
}

#[test]
fn broken_indices() {
    let dir = folder("tiny-mixtral");
    let all = tensors("tiny-mixtral");
    let index = write_shards(dir.path(), &all);
    let harm = |change: &dyn Fn(&mut Value)| {
        let mut harmed = index.clone();
        change(&mut harmed);
        write_index(dir.path(), &harmed);
        refused(dir.path())
    };
    let head = "lm_head.weight";
    for outside in [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..",
        ".",
        "",
        "./model.safetensors",
        "..\\model.safetensors",
    ] {
        match harm(&|index| index["weight_map"][head] = json!(outside)) {
            CheckpointError::IndexEscapes { tensor, shard, .. } => {
                assert_eq!((tensor.as_str(), shard.as_str()), (head, outside));
            }
            other => panic!("{outside}: {other:?}"),
        }
    }
    match harm(&|index| index["weight_map"][head] = json!("model-3.safetensors")) {
        CheckpointError::MissingShard {
            shard, tensors: 1, ..
        } => {
            assert_eq!(shard, "model-3.safetensors");
        }
        other => panic!("{other:?}"),
    }
    let other_shard = shard(1);
    assert_eq!(index["weight_map"][head], json!(shard(0)));
    match harm(&|index| index["weight_map"][head] = json!(other_shard)) {
        CheckpointError::NotInShard { tensor, shard, .. } => {
            assert!(
                tensor == head && shard.ends_with(&other_shard),
                "{tensor} {shard}"
            );
        }
        other => panic!("{other:?}"),
    }
    for (change, detail) in [
        (json!(3), "is 3, not a file name"),
        (json!(null), "is null, not a file name"),
    ] {
        match harm(&|index| index["weight_map"][head] = change.clone()) {
            CheckpointError::Index { detail: found, .. } => {
                assert!(found.contains(detail), "{found}")
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(matches!(
        harm(&|index| *index = json!([])),
        CheckpointError::Index { .. }
    ));
    assert!(matches!(
        harm(&|index| index["weight_map"] = json!({})),
        CheckpointError::Index { .. }
    ));
    fs::write(dir.path().join("model.safetensors.index.json"), "{").unwrap();
    assert!(matches!(refused(dir.path()), CheckpointError::Index { .. }));
}

#[test]
fn a_tensor_in_two_shards_is_the_one_the_index_names() {
    let name = "model.norm.weight";
    let all = tensors("tiny-mixtral");
    let dir = folder("tiny-mixtral");
    let index = write_shards(dir.path(), &all);
    // The other shard gets a copy with other content.
    let owner = index["weight_map"][name].as_str().unwrap();
    let other = shard(usize::from(owner == shard(0)));
    let path = dir.path().join(&other);
    let bytes = fs::read(&path).unwrap();
    let mut copy: Tensors = SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| {
            (
                name.to_owned(),
                (view.dtype(), view.shape().to_vec(), view.data().to_vec()),
            )
        })
        .collect();
    let mut wrong = all[name].clone();
    wrong.2.fill(0);
    copy.insert(name.to_owned(), wrong);
    write(path, &copy);
    assert_same_weights(
        &open(&fixture("tiny-mixtral")).unwrap(),
        &open(dir.path()).unwrap(),
    );

    fs::remove_file(dir.path().join("model.safetensors.index.json")).unwrap();
    match refused(dir.path()) {
        CheckpointError::Duplicate {
            tensor,
            first,
            second,
        } => {
            assert_eq!(tensor, name);
            assert!(first.ends_with(&shard(0)) && second.ends_with(&shard(1)));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn truncated_files() {
    let dir = folder("tiny-mixtral");
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(fixture("tiny-mixtral").join("model.safetensors")).unwrap();
    let cut = |length: usize| {
        fs::write(&path, &bytes[..length]).unwrap();
        refused(dir.path())
    };
    assert!(matches!(
        cut(0),
        CheckpointError::HeaderTruncated { found: 0, .. }
    ));
    assert!(matches!(cut(5), CheckpointError::HeaderTruncated { .. }));
    assert!(matches!(cut(100), CheckpointError::HeaderTruncated { .. }));
    assert!(matches!(
        cut(bytes.len() / 2),
        CheckpointError::Outside { .. }
    ));
    assert!(matches!(
        cut(bytes.len() - 1),
        CheckpointError::Outside { .. }
    ));
    fs::write(&path, [&bytes[..], b"x"].concat()).unwrap();
    assert!(matches!(
        refused(dir.path()),
        CheckpointError::Unclaimed { .. }
    ));
}

#[test]
fn tensors_that_do_not_fit_the_configuration() {
    let all = tensors("tiny-mixtral");
    let dir = folder("tiny-mixtral");
    let harm = |change: &dyn Fn(&mut Tensors)| {
        let mut harmed = all.clone();
        change(&mut harmed);
        write(dir.path().join("model.safetensors"), &harmed);
    };
    let query = "model.layers.1.self_attn.q_proj.weight";

    harm(&|all| drop(all.remove(query)));
    match problem(dir.path()) {
        WeightError::Missing { name, .. } => assert_eq!(name, query),
        other => panic!("{other:?}"),
    }
    harm(&|all| all.get_mut(query).unwrap().1 = vec![64, 256]);
    match problem(dir.path()) {
        WeightError::Shape {
            name,
            found,
            expected,
            ..
        } => {
            assert_eq!(
                (name.as_str(), found, expected),
                (query, vec![64, 256], vec![128, 128])
            );
        }
        other => panic!("{other:?}"),
    }
    // A vector stored as a matrix is not taken for the vector.
    harm(&|all| all.get_mut("model.norm.weight").unwrap().1 = vec![1, 128]);
    assert!(matches!(problem(dir.path()), WeightError::Shape { .. }));
    harm(&|all| all.get_mut(query).unwrap().0 = Dtype::I16);
    match problem(dir.path()) {
        WeightError::Element { name, found, .. } => {
            assert_eq!((name.as_str(), found.as_str()), (query, "I16"))
        }
        other => panic!("{other:?}"),
    }
    // A tensor that nobody asks for may be of any type.
    harm(&|all| drop(all.insert("extra".to_owned(), (Dtype::I64, vec![1], vec![0; 8]))));
    assert!(open(dir.path()).is_ok());

    // Many problems: the first few, and how many.
    harm(&|all| all.retain(|name, _| !name.contains(".experts.")));
    match refused(dir.path()) {
        error @ CheckpointError::Tensors { count: 24, .. } => {
            let text = error.to_string();
            assert!(
                text.contains("experts.0.w1.weight") && text.ends_with("and 19 more"),
                "{text}"
            );
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_configuration_with_fewer_layers_than_the_weights_is_refused() {
    for (name, tensor) in [
        ("tiny-mixtral", "model.layers.1."),
        ("tiny-qwen3moe", "model.layers.1."),
        ("tiny-dbrx", "transformer.blocks.1."),
    ] {
        let dir = folder(name);
        write(dir.path().join("model.safetensors"), &tensors(name));
        let path = dir.path().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let key = if name == "tiny-dbrx" {
            "n_layers"
        } else {
            "num_hidden_layers"
        };
        assert_eq!(config[key], 2, "{name}");
        config[key] = json!(1);
        fs::write(&path, config.to_string()).unwrap();
        let error = refused(dir.path());
        assert!(
            matches!(&error, CheckpointError::MoreLayers { layers: 1, tensor: found, .. } if found.starts_with(tensor)),
            "{name}: {error}"
        );
    }
}

#[test]
fn other_element_types_are_read() {
    let bf16 = open(&fixture("tiny-mixtral")).unwrap();
    let mut all = tensors("tiny-mixtral");
    for (dtype, _, data) in all.values_mut() {
        let wide: Vec<f32> = data
            .chunks_exact(2)
            .map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32())
            .collect();
        *data = wide.iter().flat_map(|value| value.to_le_bytes()).collect();
        *dtype = Dtype::F32;
    }
    let dir = folder("tiny-mixtral");
    write(dir.path().join("model.safetensors"), &all);
    assert_same_weights(&bf16, &open(dir.path()).unwrap());
}

#[test]
fn weights_are_kept_in_f16_only_if_all_of_them_are() {
    let dir = folder("tiny-mixtral");
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["torch_dtype"] = json!("float16");
    fs::write(&path, config.to_string()).unwrap();
    let mut all = tensors("tiny-mixtral");
    for (name, (dtype, _, data)) in &mut all {
        let wide = data
            .chunks_exact(2)
            .map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32());
        // Norms and routers are f32 in memory whatever they are stored as.
        if name.contains("norm") || name.contains("block_sparse_moe.gate.") {
            (*dtype, *data) = (Dtype::F32, wide.flat_map(f32::to_le_bytes).collect());
        } else {
            let narrow = wide.flat_map(|value| half::f16::from_f32(value).to_le_bytes());
            (*dtype, *data) = (Dtype::F16, narrow.collect());
        }
    }
    let stored_as = |all: &Tensors| {
        write(dir.path().join("model.safetensors"), all);
        open(dir.path()).unwrap().spec().stored_as
    };
    assert_eq!(stored_as(&all), Some(ElementType::F16));
    let query = "model.layers.1.self_attn.q_proj.weight";
    all.get_mut(query).unwrap().0 = Dtype::BF16;
    assert_eq!(stored_as(&all), None);
}

#[cfg(unix)]
#[test]
fn links_are_followed_as_download_caches_are_made_of_them() {
    let dir = folder("tiny-mixtral");
    let link = dir.path().join("model.safetensors");
    std::os::unix::fs::symlink(fixture("tiny-mixtral").join("model.safetensors"), &link).unwrap();
    assert!(open(dir.path()).is_ok());
    fs::remove_file(&link).unwrap();
    std::os::unix::fs::symlink("/nowhere/at/all", &link).unwrap();
    assert!(matches!(refused(dir.path()), CheckpointError::Io { .. }));
}
