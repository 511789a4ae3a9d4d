//! The bytes of one checkpoint file: mapped from disk, or in memory already.
#![allow(unsafe_code)]

use std::{
    fs::File,
    io,
    ops::{Deref, Range},
    path::Path,
    sync::Arc,
};

#[cfg(unix)]
use memmap2::Advice;
use memmap2::Mmap;

use super::CheckpointError;

/// The whole of a safetensors file.
#[derive(Debug)]
pub(super) enum FileBytes {
    Mapped(Mmap),
    Memory(WeightBytes),
}

/// A safetensors file in memory, for a model that travels inside a program.
#[derive(Debug, Clone)]
pub enum WeightBytes {
    /// Part of the program (`include_bytes!`).
    Static(&'static [u8]),
    /// Shared among holders.
    Shared(Arc<[u8]>),
}

impl From<&'static [u8]> for WeightBytes {
    fn from(bytes: &'static [u8]) -> Self {
        WeightBytes::Static(bytes)
    }
}

impl From<Arc<[u8]>> for WeightBytes {
    fn from(bytes: Arc<[u8]>) -> Self {
        WeightBytes::Shared(bytes)
    }
}

impl From<Vec<u8>> for WeightBytes {
    fn from(bytes: Vec<u8>) -> Self {
        WeightBytes::Shared(bytes.into())
    }
}

impl Deref for FileBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            FileBytes::Mapped(map) => map,
            FileBytes::Memory(WeightBytes::Static(bytes)) => bytes,
            FileBytes::Memory(WeightBytes::Shared(bytes)) => bytes,
        }
    }
}

impl FileBytes {
    /// Lets the system begin to read a part, where it is on disk.
    pub(super) fn prefetch(&self, range: Range<usize>) {
        #[cfg(unix)]
        if let FileBytes::Mapped(map) = self {
            // A refusal costs speed and nothing else.
            let _ = map.advise_range(Advice::WillNeed, range.start, range.len());
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// Maps a regular file for reading. Reads nothing yet.
pub(super) fn map(path: &Path) -> Result<FileBytes, CheckpointError> {
    let failed = |source: io::Error| CheckpointError::Io {
        file: path.display().to_string(),
        source,
    };
    // Asked before opening: opening a pipe would wait for its writer.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(CheckpointError::NotAFile {
            file: path.display().to_string(),
        });
    }
    let file = File::open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.len() == 0 {
        // An empty mapping is an error on some systems; the header reader refuses empty bytes with a better one.
        return Ok(FileBytes::Memory(WeightBytes::Static(&[])));
    }
    // SAFETY: the mapping is read-only and private. Rust's rule that its bytes never change rests on nobody writing to
    // the file while a process serves it, which `Checkpoint`'s documentation asks for. Every read afterwards goes
    // through a bounds-checked slice of integers or floats, for which any bytes are valid, so that an overwritten file
    // gives wrong numbers and a truncated one SIGBUS, never a wild access.
    let map = unsafe { Mmap::map(&file) }.map_err(failed)?;
    Ok(FileBytes::Mapped(map))
}
