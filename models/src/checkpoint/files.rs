//! Which files make up a checkpoint: one file, an index with shards, or shards without an index.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    path::{Component, Path, PathBuf},
};

use serde_json::Value;

use super::CheckpointError;

/// Largest index, in bytes. The largest published one (DeepSeek-V3, 91,991 tensors) has 9 MB.
pub const INDEX_BYTES_MAX: u64 = 256 << 20;

/// Most files of one checkpoint.
pub const SHARDS_MAX: usize = 4096;

/// The files of a checkpoint, and the index where there is one.
pub(super) struct Files {
    pub(super) paths: Vec<PathBuf>,
    pub(super) index: Option<Index>,
}

/// What `model.safetensors.index.json` says.
pub(super) struct Index {
    pub(super) file: String,
    /// Tensor to position in [`Files::paths`].
    pub(super) shard_of: HashMap<String, usize>,
}

/// Finds the files of the checkpoint in `dir`, by transformers' precedence: `model.safetensors`, then the index; and where there
/// is neither, every `model*.safetensors` in order of name.
pub(super) fn find(dir: &Path) -> Result<Files, CheckpointError> {
    let single = dir.join("model.safetensors");
    if exists(&single)? {
        return Ok(Files {
            paths: vec![single],
            index: None,
        });
    }
    let index = dir.join("model.safetensors.index.json");
    if exists(&index)? {
        return read_index(dir, &index);
    }
    let failed = |source| CheckpointError::Io {
        file: dir.display().to_string(),
        source,
    };
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("model") && name.ends_with(".safetensors") {
            paths.push(dir.join(&*name));
        }
    }
    paths.sort();
    paths.truncate(SHARDS_MAX + 1);
    if paths.is_empty() || paths.len() > SHARDS_MAX {
        return Err(CheckpointError::NoWeights {
            dir: dir.display().to_string(),
        });
    }
    Ok(Files { paths, index: None })
}

fn exists(path: &Path) -> Result<bool, CheckpointError> {
    match fs::symlink_metadata(path) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(CheckpointError::Io {
            file: path.display().to_string(),
            source,
        }),
    }
}

fn read_index(dir: &Path, path: &Path) -> Result<Files, CheckpointError> {
    let file = path.display().to_string();
    let malformed = |detail: String| CheckpointError::Index {
        file: file.clone(),
        detail,
    };
    let failed = |source| CheckpointError::Io {
        file: file.clone(),
        source,
    };
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        return Err(CheckpointError::NotAFile { file });
    }
    if metadata.len() > INDEX_BYTES_MAX {
        return Err(malformed(format!(
            "it has {} bytes; the limit is {INDEX_BYTES_MAX}",
            metadata.len()
        )));
    }
    let bytes = fs::read(path).map_err(failed)?;
    let index: Value =
        serde_json::from_slice(&bytes).map_err(|error| malformed(error.to_string()))?;
    let Some(weight_map) = index.get("weight_map").and_then(Value::as_object) else {
        return Err(malformed("there is no object `weight_map`".to_owned()));
    };

    let mut tensors_by_shard: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, shard) in weight_map {
        let Some(shard) = shard.as_str() else {
            return Err(malformed(format!(
                "`weight_map.{tensor}` is {shard}, not a file name"
            )));
        };
        if !is_plain_name(shard) {
            return Err(CheckpointError::IndexEscapes {
                file,
                tensor: tensor.clone(),
                shard: shard.to_owned(),
            });
        }
        tensors_by_shard.entry(shard).or_default().push(tensor);
    }
    if tensors_by_shard.is_empty() || tensors_by_shard.len() > SHARDS_MAX {
        return Err(malformed(format!(
            "it names {} shards; a checkpoint has 1 to {SHARDS_MAX}",
            tensors_by_shard.len()
        )));
    }
    let mut paths = Vec::with_capacity(tensors_by_shard.len());
    let mut shard_of = HashMap::with_capacity(weight_map.len());
    for (position, (shard, tensors)) in tensors_by_shard.into_iter().enumerate() {
        let shard_path = dir.join(shard);
        // Follows links, as a cache of downloads is made of them: a dangling one is a missing shard.
        if let Err(error) = fs::metadata(&shard_path)
            && error.kind() == io::ErrorKind::NotFound
        {
            return Err(CheckpointError::MissingShard {
                file,
                shard: shard.to_owned(),
                tensors: tensors.len(),
            });
        }
        shard_of.extend(
            tensors
                .into_iter()
                .map(|tensor| (tensor.to_owned(), position)),
        );
        paths.push(shard_path);
    }
    Ok(Files {
        paths,
        index: Some(Index { file, shard_of }),
    })
}

/// One component, and that an ordinary one. Backslashes are refused everywhere, as an index may come from anywhere.
fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!(components.next(), Some(Component::Normal(first)) if first == name)
        && components.next().is_none()
        && !name.contains(['\\', '\0'])
}
