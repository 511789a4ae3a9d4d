//! A Hugging Face model directory: configuration, weights, tokenizer and chat template under one roof.

use std::{
    borrow::Cow,
    fmt, fs,
    io::{self, Read},
    path::{Path, PathBuf},
    sync::Arc,
};

use crate::{
    ChatError, ChatTemplate, Checkpoint, CheckpointError, ConfigError, DenseTensor, DummyWeights,
    ExpertTensor, GenerationDefaults, ModelSpec, TensorId, Tokenizer, TokenizerError, WeightBytes,
    WeightError, WeightSource, parse_config,
};

/// Largest `config.json`, `generation_config.json`, `tokenizer_config.json` or `chat_template.jinja`, in bytes.
pub const CONFIG_BYTES_MAX: u64 = 16 << 20;
/// Largest `tokenizer.json`, in bytes. Those of vocabularies of 256 Ki entries have about 35 MB.
pub const TOKENIZER_BYTES_MAX: u64 = 512 << 20;

/// Where the weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LoadFormat {
    /// The safetensors files of the directory.
    #[default]
    Auto,
    /// Seeded random values; only `config.json` is needed.
    Dummy {
        /// The seed.
        seed: u64,
    },
}

/// A model as its authors publish it, opened and checked.
///
/// Cheap to clone; clones share the weights.
#[derive(Clone)]
pub struct ModelDir {
    name: String,
    generation: GenerationDefaults,
    weights: Weights,
    texts: Texts,
}

/// The files of a model in memory, for a model that travels inside a program. Absent files are `None`.
#[derive(Debug, Clone)]
pub struct ModelParts {
    /// What the model is called.
    pub name: String,
    /// `config.json`.
    pub config: Cow<'static, [u8]>,
    /// `generation_config.json`.
    pub generation_config: Option<Cow<'static, [u8]>>,
    /// `tokenizer.json`.
    pub tokenizer: Option<Cow<'static, [u8]>>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<Cow<'static, [u8]>>,
    /// `chat_template.jinja`.
    pub chat_template: Option<Cow<'static, [u8]>>,
    /// `model.safetensors`.
    pub weights: WeightBytes,
}

/// Why a model could not be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file could not be read.
    #[error("{file}: {source}")]
    Io {
        /// The file.
        file: String,
        /// What the system said.
        source: io::Error,
    },
    /// A file is larger than any real one.
    #[error("{file} is larger than {limit} bytes, the limit for such a file")]
    TooLarge {
        /// The file.
        file: String,
        /// The limit.
        limit: u64,
    },
    /// The configuration was refused.
    #[error("{model}: {source}")]
    Config {
        /// The model.
        model: String,
        /// Why.
        source: Box<ConfigError>,
    },
    /// The weights were refused.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A tensor could not be read.
    #[error(transparent)]
    Weight(#[from] WeightError),
    /// The tokenizer was refused.
    #[error("{model}: {source}")]
    Tokenizer {
        /// The model.
        model: String,
        /// Why.
        source: TokenizerError,
    },
    /// The chat template was refused.
    #[error("{model}: {source}")]
    Chat {
        /// The model.
        model: String,
        /// Why.
        source: ChatError,
    },
}

/// A number that two workers compare before they work together. Equal models have equal hashes; different shapes, types
/// or files, or fine-tuned attention weights, have different ones with near certainty. It is no defence against an adversary.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ModelHash(pub u128);

impl ModelDir {
    /// Opens the model in directory `path`. Its name is that of the directory.
    ///
    /// # Errors
    /// When the configuration or, unless dummy, the checkpoint is absent or refused. Tokenizer and chat template are
    /// not looked at before they are asked for.
    pub fn open(path: impl AsRef<Path>, format: LoadFormat) -> Result<ModelDir, ModelError> {
        let path = path.as_ref();
        let texts = Texts::Directory(path.to_owned());
        let config = texts.require("config.json")?;
        let generation = texts.read("generation_config.json")?;
        let (spec, generation) =
            parse_config(&config, generation.as_deref()).map_err(|source| ModelError::Config {
                model: path.display().to_string(),
                source: Box::new(source),
            })?;
        let weights = match format {
            LoadFormat::Auto => Weights::Checkpoint(Arc::new(Checkpoint::open(path, spec)?)),
            LoadFormat::Dummy { seed } => Weights::Dummy(Arc::new(DummyWeights::new(spec, seed))),
        };
        Ok(ModelDir {
            name: directory_name(path),
            generation,
            weights,
            texts,
        })
    }

    /// Opens a model whose files are in memory.
    ///
    /// # Errors
    /// As [`ModelDir::open`].
    pub fn from_parts(parts: ModelParts) -> Result<ModelDir, ModelError> {
        let (spec, generation) = parse_config(&parts.config, parts.generation_config.as_deref())
            .map_err(|source| ModelError::Config {
                model: parts.name.clone(),
                source: Box::new(source),
            })?;
        let checkpoint = Checkpoint::from_bytes(&parts.name, parts.weights.clone(), spec)?;
        Ok(ModelDir {
            name: parts.name.clone(),
            generation,
            weights: Weights::Checkpoint(Arc::new(checkpoint)),
            texts: Texts::Parts(Arc::new(parts)),
        })
    }

    /// What the model is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its shape.
    pub fn spec(&self) -> &ModelSpec {
        match &self.weights {
            Weights::Checkpoint(checkpoint) => checkpoint.spec(),
            Weights::Dummy(dummy) => dummy.spec(),
        }
    }

    /// Its weights, read tensor by tensor as they are asked for.
    pub fn weights(&self) -> Arc<dyn WeightSource> {
        match &self.weights {
            Weights::Checkpoint(checkpoint) => checkpoint.clone(),
            Weights::Dummy(dummy) => dummy.clone(),
        }
    }

    /// How its authors want it sampled.
    pub fn generation_defaults(&self) -> GenerationDefaults {
        self.generation
    }

    /// Reads its tokenizer, which takes a while for a large vocabulary: keep it.
    ///
    /// # Errors
    /// When `tokenizer.json` is absent or refused.
    pub fn tokenizer(&self) -> Result<Tokenizer, ModelError> {
        let refused = |source| ModelError::Tokenizer {
            model: self.texts.place(),
            source,
        };
        let Some(tokenizer) = self.texts.read("tokenizer.json")? else {
            return Err(refused(TokenizerError::NoTokenizer));
        };
        let config = self.texts.read("tokenizer_config.json")?;
        Tokenizer::from_bytes(&tokenizer, config.as_deref()).map_err(refused)
    }

    /// Reads and compiles its chat template: keep it.
    ///
    /// # Errors
    /// When the model has none, or one that does not compile.
    pub fn chat_template(&self) -> Result<ChatTemplate, ModelError> {
        let jinja = self.texts.read("chat_template.jinja")?;
        let config = self.texts.read("tokenizer_config.json")?;
        ChatTemplate::from_bytes(jinja.as_deref(), config.as_deref()).map_err(|source| {
            ModelError::Chat {
                model: self.texts.place(),
                source,
            }
        })
    }

    /// The hash that workers compare: over the spec, the names, shapes and types of the stored tensors, the sizes of
    /// the files, and a few values of each layer (a page or two of each; the rest of the data stays untouched).
    ///
    /// # Errors
    /// When a tensor cannot be read, which opening has ruled out.
    pub fn content_hash(&self) -> Result<ModelHash, ModelError> {
        let mut hash = Fnv::new();
        let spec = serde_json::to_vec(self.spec()).unwrap_or_default();
        hash.field(&spec);
        match &self.weights {
            Weights::Dummy(dummy) => {
                hash.field(b"dummy");
                hash.field(&dummy.seed().to_le_bytes());
            }
            Weights::Checkpoint(checkpoint) => {
                for (name, dtype, shape) in checkpoint.stored_tensors() {
                    hash.field(name.as_bytes());
                    hash.field(format!("{dtype:?} {shape:?}").as_bytes());
                }
                for size in checkpoint.file_sizes() {
                    hash.field(&size.to_le_bytes());
                }
                for id in self.sampled_tensors() {
                    let view = checkpoint.tensor(id)?;
                    hash.field(&view.data[..view.data.len().min(SAMPLE_BYTES)]);
                }
            }
        }
        Ok(ModelHash(hash.0))
    }

    /// Tensors whose first values tell a fine-tuned model from its base.
    fn sampled_tensors(&self) -> impl Iterator<Item = TensorId> + '_ {
        (0..self.spec().layers.len())
            .flat_map(|layer| {
                [
                    TensorId::Dense(layer, DenseTensor::FfnNorm),
                    TensorId::Dense(layer, DenseTensor::Query),
                    TensorId::Dense(layer, DenseTensor::Output),
                    TensorId::Expert(layer, 0, ExpertTensor::Gate),
                ]
            })
            .filter(|id| id.shape(self.spec()).is_some())
    }
}

/// Bytes of each sampled tensor that go into the hash.
const SAMPLE_BYTES: usize = 256;

impl fmt::Debug for ModelDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelDir")
            .field("name", &self.name)
            .field("spec", self.spec())
            .finish_non_exhaustive()
    }
}

impl fmt::Display for ModelHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

#[derive(Clone)]
enum Weights {
    Checkpoint(Arc<Checkpoint>),
    Dummy(Arc<DummyWeights>),
}

/// Where the text files are.
#[derive(Clone)]
enum Texts {
    Directory(PathBuf),
    Parts(Arc<ModelParts>),
}

impl Texts {
    /// Where they are, for messages: the directory, or the name of a model that is in none.
    fn place(&self) -> String {
        match self {
            Texts::Directory(dir) => dir.display().to_string(),
            Texts::Parts(parts) => parts.name.to_string(),
        }
    }

    /// A file's bytes, or `None` where there is no such file.
    fn read(&self, name: &str) -> Result<Option<Cow<'_, [u8]>>, ModelError> {
        let dir = match self {
            Texts::Directory(dir) => dir,
            Texts::Parts(parts) => {
                let part = match name {
                    "config.json" => Some(&parts.config),
                    "generation_config.json" => parts.generation_config.as_ref(),
                    "tokenizer.json" => parts.tokenizer.as_ref(),
                    "tokenizer_config.json" => parts.tokenizer_config.as_ref(),
                    "chat_template.jinja" => parts.chat_template.as_ref(),
                    _ => None,
                };
                return Ok(part.map(|bytes| Cow::Borrowed(&**bytes)));
            }
        };
        let path = dir.join(name);
        let limit = if name == "tokenizer.json" {
            TOKENIZER_BYTES_MAX
        } else {
            CONFIG_BYTES_MAX
        };
        match read_bounded(&path, limit) {
            Err(ModelError::Io { source, .. })
                if source.kind() == io::ErrorKind::NotFound && dir.is_dir() =>
            {
                Ok(None)
            }
            other => other.map(|bytes| Some(Cow::Owned(bytes))),
        }
    }

    fn require(&self, name: &str) -> Result<Cow<'_, [u8]>, ModelError> {
        self.read(name)?.ok_or_else(|| ModelError::Io {
            file: match self {
                Texts::Directory(dir) => dir.join(name).display().to_string(),
                Texts::Parts(parts) => format!("{}/{name}", parts.name),
            },
            source: io::Error::new(
                io::ErrorKind::NotFound,
                "there is no such file; is this a Hugging Face model directory?",
            ),
        })
    }
}

fn read_bounded(path: &Path, limit: u64) -> Result<Vec<u8>, ModelError> {
    let failed = |source| ModelError::Io {
        file: path.display().to_string(),
        source,
    };
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        return Err(failed(io::Error::other("not a regular file")));
    }
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(failed)?;
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if bytes.len() as u64 > limit {
        return Err(ModelError::TooLarge {
            file: path.display().to_string(),
            limit,
        });
    }
    Ok(bytes)
}

/// The last component of a path, also of `.` and of a path with a slash at its end.
fn directory_name(path: &Path) -> String {
    let resolved = path.canonicalize();
    let path = resolved.as_deref().unwrap_or(path);
    path.file_name()
        .unwrap_or(path.as_os_str())
        .to_string_lossy()
        .into_owned()
}

/// FNV-1a with 128 bits (Fowler, Noll, Vo): short, the same everywhere, and enough where nobody forges.
struct Fnv(u128);

impl Fnv {
    fn new() -> Fnv {
        Fnv(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d)
    }

    /// Length and bytes, so that fields cannot run into each other.
    fn field(&mut self, bytes: &[u8]) {
        for byte in (bytes.len() as u64).to_le_bytes().iter().chain(bytes) {
            self.0 = (self.0 ^ u128::from(*byte))
                .wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
    }
}
