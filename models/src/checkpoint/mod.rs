//! Safetensors checkpoints as a [`WeightSource`]: mapped, checked against the configuration, read tensor by tensor.
//!
//! Opening reads headers only and checks the presence, shape and type of every tensor the configuration calls for.
//! The data pages of a tensor are touched when somebody reads that tensor, so a worker pays for its own shard only.

mod bytes;
mod error;
mod files;
mod header;
mod names;

use std::{
    borrow::Cow,
    collections::{HashMap, HashSet},
    path::Path,
};

use safetensors::Dtype;

pub use bytes::WeightBytes;
pub use error::CheckpointError;
pub use files::{INDEX_BYTES_MAX, SHARDS_MAX};
pub use header::HEADER_BYTES_MAX;

use self::{bytes::FileBytes, header::Stored, names::Place};
use crate::{DenseTensor, ElementType, MatrixView, ModelSpec, TensorId, WeightError, WeightSource};

/// How many problems an error lists, and how many unused tensors a warning.
const LISTED_MAX: usize = 5;

/// The weights of one model in safetensors files.
///
/// # Files that change while they are served
/// The files are mapped, not copied. Whoever replaces a checkpoint must write new files and rename them into place, as
/// every downloader does: the mapping keeps the old ones. Whoever overwrites a file *in place* changes the weights under a
/// worker that still reads them; whoever truncates one makes that worker die of SIGBUS at its next read. After a worker has
/// packed its tensors it does not read the files again. That a file is complete when it is opened is checked.
#[derive(Debug)]
pub struct Checkpoint {
    spec: ModelSpec,
    /// The directory, for messages.
    place: String,
    files: Vec<CheckpointFile>,
    tensors: HashMap<String, (usize, Stored)>,
}

#[derive(Debug)]
struct CheckpointFile {
    name: String,
    bytes: FileBytes,
}

impl Checkpoint {
    /// Opens the checkpoint in `dir` for the model `spec`.
    ///
    /// The files are `model.safetensors`; or else what `model.safetensors.index.json` names; or else every
    /// `model*.safetensors`. A tensor in two files is the one the index names, and refused without an index.
    ///
    /// # Errors
    /// When a file is missing, damaged or not there whole, or a tensor does not fit `spec`.
    pub fn open(dir: &Path, spec: ModelSpec) -> Result<Checkpoint, CheckpointError> {
        let found = files::find(dir)?;
        let mut files = Vec::with_capacity(found.paths.len());
        for path in &found.paths {
            files.push(CheckpointFile {
                name: path.display().to_string(),
                bytes: bytes::map(path)?,
            });
        }
        let place = dir.display().to_string();
        Checkpoint::assemble(place, files, found.index, spec)
    }

    /// Opens a checkpoint that is one safetensors file in memory; `name` is for messages.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_bytes(
        name: &str,
        bytes: WeightBytes,
        spec: ModelSpec,
    ) -> Result<Checkpoint, CheckpointError> {
        let file = CheckpointFile {
            name: name.to_owned(),
            bytes: FileBytes::Memory(bytes),
        };
        Checkpoint::assemble(name.to_owned(), vec![file], None, spec)
    }

    /// Every stored tensor in order of name: name, element type, shape.
    pub fn stored_tensors(&self) -> Vec<(&str, Dtype, &[usize])> {
        let mut tensors: Vec<_> = self
            .tensors
            .iter()
            .map(|(name, (_, stored))| (name.as_str(), stored.dtype, stored.shape.as_slice()))
            .collect();
        tensors.sort_unstable_by_key(|tensor| tensor.0);
        tensors
    }

    /// Sizes of the files in bytes, in order of name.
    pub fn file_sizes(&self) -> impl Iterator<Item = u64> + '_ {
        self.files.iter().map(|file| file.bytes.len() as u64)
    }

    fn assemble(
        place: String,
        files: Vec<CheckpointFile>,
        index: Option<files::Index>,
        spec: ModelSpec,
    ) -> Result<Checkpoint, CheckpointError> {
        let mut tensors: HashMap<String, (usize, Stored)> = HashMap::new();
        for (position, file) in files.iter().enumerate() {
            for (name, stored) in header::parse(&file.name, &file.bytes)? {
                let chosen = index.as_ref().and_then(|index| index.shard_of.get(&name));
                match (chosen, tensors.get(&name)) {
                    (Some(&chosen), _) if chosen != position => {}
                    (None, Some(&(first, _))) => {
                        return Err(CheckpointError::Duplicate {
                            tensor: name,
                            first: files[first].name.clone(),
                            second: file.name.clone(),
                        });
                    }
                    _ => {
                        tensors.insert(name, (position, stored));
                    }
                }
            }
        }
        if let Some(index) = index
            && let Some((tensor, &shard)) = index
                .shard_of
                .iter()
                .filter(|(tensor, _)| !tensors.contains_key(*tensor))
                .min()
        {
            return Err(CheckpointError::NotInShard {
                file: index.file,
                tensor: tensor.clone(),
                shard: files[shard].name.clone(),
            });
        }
        let mut checkpoint = Checkpoint {
            spec,
            place,
            files,
            tensors,
        };
        checkpoint.check_all()?;
        checkpoint.check_stored_as();
        Ok(checkpoint)
    }

    /// Matrices are packed as f16 only if they are: another type's range would not fit, whatever the configuration says. The router
    /// is packed as f32 always.
    fn check_stored_as(&mut self) {
        if self.spec.stored_as != Some(ElementType::F16) {
            return;
        }
        let matrices = TensorId::all(&self.spec)
            .filter(|id| !id.is_vector() && !matches!(id, TensorId::Dense(_, DenseTensor::Router)));
        let other = matrices
            .filter_map(|id| self.find(id).ok())
            .find(|(.., element)| *element != ElementType::F16);
        if let Some((place, .., element)) = other {
            tracing::warn!(
                checkpoint = %self.place,
                tensor = %place.name,
                stored_as = ?element,
                "The checkpoint is not all in float16, as config.json says. Its weights are kept in f32 unless --dtype says otherwise."
            );
            self.spec.stored_as = None;
        }
    }

    /// Looks every tensor of the model up, and warns of tensors that are nobody's.
    fn check_all(&self) -> Result<(), CheckpointError> {
        let mut problems = Vec::new();
        let mut count = 0;
        let mut unused: HashSet<&str> = self.tensors.keys().map(String::as_str).collect();
        for id in TensorId::all(&self.spec) {
            match self.find(id) {
                Ok((place, ..)) => {
                    unused.remove(place.name.as_str());
                }
                Err(problem) => {
                    count += 1;
                    if problems.len() < LISTED_MAX {
                        problems.push(problem);
                    }
                }
            }
        }
        if count > 0 {
            return Err(CheckpointError::Tensors {
                dir: self.place.clone(),
                problems,
                count,
            });
        }
        let mut unused: Vec<&str> = unused
            .into_iter()
            .filter(|name| !names::is_harmless(name))
            .collect();
        unused.sort_unstable();
        let layers = self.spec.layers.len();
        if let Some(tensor) = unused
            .iter()
            .find(|name| names::layer(name).is_some_and(|layer| layer >= layers))
        {
            return Err(CheckpointError::MoreLayers {
                dir: self.place.clone(),
                tensor: (*tensor).to_owned(),
                layers,
            });
        }
        if !unused.is_empty() {
            tracing::warn!(
                checkpoint = %self.place,
                count = unused.len(),
                first = ?&unused[..unused.len().min(LISTED_MAX)],
                "The checkpoint holds tensors that this model does not use. Check that config.json belongs to it."
            );
        }
        Ok(())
    }

    /// The place of a tensor, with presence, type and shape checked.
    fn find(&self, id: TensorId) -> Result<(Place, &Stored, usize, ElementType), WeightError> {
        let places = names::places(&self.spec, id);
        let Some(first) = places.first().map(|place| place.name.clone()) else {
            return Err(WeightError::Absent { id });
        };
        let Some((place, (file, stored))) = places
            .into_iter()
            .find_map(|place| self.tensors.get(&place.name).map(|found| (place, found)))
        else {
            return Err(WeightError::Missing {
                file: self.place.clone(),
                name: first,
            });
        };
        let element = match stored.dtype {
            Dtype::F32 => ElementType::F32,
            Dtype::F16 => ElementType::F16,
            Dtype::BF16 => ElementType::Bf16,
            other => {
                return Err(WeightError::Element {
                    file: self.files[*file].name.clone(),
                    name: place.name,
                    found: format!("{other:?}"),
                });
            }
        };
        if stored.shape != place.stored_shape {
            return Err(WeightError::Shape {
                file: self.files[*file].name.clone(),
                name: place.name,
                found: stored.shape.clone(),
                expected: place.stored_shape,
            });
        }
        Ok((place, stored, *file, element))
    }
}

/// Bytes of all tensors of a safetensors file, with its header checked as in [`Checkpoint::open`]. For fuzzing.
pub(crate) fn covered_bytes(name: &str, bytes: &[u8]) -> Result<usize, CheckpointError> {
    let tensors = header::parse(name, bytes)?;
    for stored in tensors.values() {
        debug_assert!(bytes.get(stored.begin..stored.end).is_some());
    }
    Ok(tensors
        .values()
        .map(|stored| stored.end - stored.begin)
        .sum())
}

impl WeightSource for Checkpoint {
    fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    fn prefetch(&self, id: TensorId) {
        if id.shape(&self.spec).is_some()
            && let Ok((_, stored, file, _)) = self.find(id)
        {
            self.files[file].bytes.prefetch(stored.begin..stored.end);
        }
    }

    fn tensor(&self, id: TensorId) -> Result<MatrixView<'_>, WeightError> {
        let (rows, cols) = id.shape(&self.spec).ok_or(WeightError::Absent { id })?;
        let (place, stored, file, element) = self.find(id)?;
        // The shape is right and the header fills its bytes exactly, so the matrix lies within them.
        let elements = (rows - 1) * place.row_stride + (cols - 1) * place.col_stride + 1;
        let begin = stored.begin + place.offset * element.bytes();
        let data = &self.files[file].bytes[begin..begin + elements * element.bytes()];
        Ok(MatrixView {
            data: Cow::Borrowed(data),
            element,
            rows,
            cols,
            row_stride: place.row_stride,
            col_stride: place.col_stride,
        })
    }
}
