//! Why a checkpoint was refused.

use std::io;

use crate::WeightError;

/// Why the weights of a model could not be opened. Paths are shown as they were found; sizes are in bytes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The directory holds no safetensors files.
    #[error(
        "{dir}: there is no model.safetensors, no model.safetensors.index.json and no other model*.safetensors; \
         convert the checkpoint to safetensors, or use the load format `dummy` to run without weights"
    )]
    NoWeights {
        /// The directory.
        dir: String,
    },
    /// The operating system refused.
    #[error("{file}: {source}")]
    Io {
        /// The file or directory.
        file: String,
        /// What it said.
        source: io::Error,
    },
    /// A directory, a pipe or a device stands where a file should.
    #[error("{file} is not a regular file")]
    NotAFile {
        /// Its path.
        file: String,
    },
    /// The index is not what an index looks like.
    #[error("{file} is not a safetensors index: {detail}")]
    Index {
        /// The index.
        file: String,
        /// What is wrong with it.
        detail: String,
    },
    /// The index names a file outside of the checkpoint's directory.
    #[error(
        "{file}: tensor `{tensor}` is said to be in `{shard}`; a shard must be a plain file name beside the index"
    )]
    IndexEscapes {
        /// The index.
        file: String,
        /// The tensor.
        tensor: String,
        /// The offending name.
        shard: String,
    },
    /// A shard that the index names is not there.
    #[error(
        "{file} names the shard `{shard}` for {tensors} tensors, but it is not there; is the download complete?"
    )]
    MissingShard {
        /// The index.
        file: String,
        /// The shard.
        shard: String,
        /// How many tensors it should hold.
        tensors: usize,
    },
    /// The index places a tensor in a shard that does not hold it.
    #[error(
        "{file} places tensor `{tensor}` in `{shard}`, which does not hold it; index and shards are of different checkpoints"
    )]
    NotInShard {
        /// The index.
        file: String,
        /// The tensor.
        tensor: String,
        /// The shard.
        shard: String,
    },
    /// Two files hold a tensor of one name, and no index says which counts.
    #[error(
        "tensor `{tensor}` is in {first} and in {second}, and no index says which counts; remove the file that does not belong here"
    )]
    Duplicate {
        /// The tensor.
        tensor: String,
        /// One file.
        first: String,
        /// The other.
        second: String,
    },
    /// The file ends before its header does.
    #[error(
        "{file} has {found} bytes, but its header alone takes {needed}; is the download complete?"
    )]
    HeaderTruncated {
        /// The file.
        file: String,
        /// Bytes of the length field and the header it announces.
        needed: u64,
        /// Bytes in the file.
        found: u64,
    },
    /// The announced header is larger than any real one.
    #[error(
        "{file} announces a header of {bytes} bytes; the limit is {limit}, so this is hardly a safetensors file"
    )]
    HeaderTooLarge {
        /// The file.
        file: String,
        /// Announced size.
        bytes: u64,
        /// The limit.
        limit: u64,
    },
    /// The header is not a JSON object.
    #[error("{file}: the header is not a JSON object: {source}")]
    HeaderSyntax {
        /// The file.
        file: String,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A tensor's entry in the header lacks a field, or has one that is out of range or unknown.
    #[error("{file}: the header's entry of tensor `{tensor}` is malformed: {source}")]
    Entry {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A tensor's bytes lie outside of the file.
    #[error(
        "{file}: tensor `{tensor}` takes bytes {begin}..{end} of the data, but there are {found}; is the download complete?"
    )]
    Outside {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// First byte, counted from the end of the header.
        begin: u64,
        /// One past the last.
        end: u64,
        /// Bytes after the header.
        found: u64,
    },
    /// A tensor ends before it begins.
    #[error(
        "{file}: tensor `{tensor}` begins at byte {begin} of the data and ends at byte {end}, before it; the file is damaged"
    )]
    Backwards {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// First byte, counted from the end of the header.
        begin: u64,
        /// One past the last.
        end: u64,
    },
    /// A tensor's shape and type make another size than its bytes have.
    #[error(
        "{file}: tensor `{tensor}` of shape {shape:?} and type {dtype} does not fill its {bytes} bytes exactly"
    )]
    Size {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Its shape.
        shape: Vec<usize>,
        /// Its type.
        dtype: String,
        /// Its bytes by the offsets.
        bytes: u64,
    },
    /// Two tensors share bytes.
    #[error("{file}: tensors `{first}` and `{second}` overlap at byte {at} of the data")]
    Overlap {
        /// The file.
        file: String,
        /// One.
        first: String,
        /// The other.
        second: String,
        /// Where the second begins.
        at: u64,
    },
    /// Bytes that belong to no tensor, which the format forbids.
    #[error(
        "{file}: bytes {begin}..{end} of the data belong to no tensor, which safetensors forbids; the file is damaged"
    )]
    Unclaimed {
        /// The file.
        file: String,
        /// First such byte.
        begin: u64,
        /// One past the last.
        end: u64,
    },
    /// The files are sound, but tensors are missing or not as the configuration has them.
    #[error("{dir} does not fit its config.json in {count} tensors: {}", list(.problems, *.count))]
    Tensors {
        /// The checkpoint.
        dir: String,
        /// The first few problems.
        problems: Vec<WeightError>,
        /// How many there are in all.
        count: usize,
    },
    /// The files hold layers beyond those that the configuration has: the answers would be those of a part of the model.
    #[error(
        "{dir} does not fit its config.json: config.json has {layers} layers, but there is a tensor `{tensor}`; \
         correct the number of layers, or take the config.json that came with these weights"
    )]
    MoreLayers {
        /// The checkpoint.
        dir: String,
        /// A tensor of such a layer.
        tensor: String,
        /// Layers by the configuration.
        layers: usize,
    },
}

fn list(problems: &[WeightError], count: usize) -> String {
    let mut text = problems
        .iter()
        .map(WeightError::to_string)
        .collect::<Vec<_>>()
        .join("; ");
    if count > problems.len() {
        text.push_str(&format!("; and {} more", count - problems.len()));
    }
    text
}
