//! The header of a safetensors file: what stands where, checked before anything is believed.
//!
//! The format (github.com/huggingface/safetensors, "Format"): eight bytes of little-endian header length, the header as JSON, then the
//! data, which the tensors cover without gaps or overlaps. The entry type is the `safetensors` crate's; the walk over them
//! is ours, because the crate's errors name no tensor and its sum of the file's length can overflow. The tests hold the two against
//! each other.

use std::collections::HashMap;

use safetensors::{Dtype, tensor::TensorInfo};
use serde_json::{Map, Value};

use super::CheckpointError;

/// Bytes of the length field.
const LENGTH_BYTES: usize = 8;

/// Largest header, in bytes: the limit of the `safetensors` crate, which no writer exceeds.
pub const HEADER_BYTES_MAX: usize = 100_000_000;

/// A tensor of a file. Offsets count from the start of the file, and lie within it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) begin: usize,
    pub(super) end: usize,
}

/// Reads the header of `bytes`, which are the whole of `file`. Touches no byte behind the header.
pub(super) fn parse(file: &str, bytes: &[u8]) -> Result<HashMap<String, Stored>, CheckpointError> {
    let file = || file.to_owned();
    let truncated = |needed: u64| CheckpointError::HeaderTruncated {
        file: file(),
        needed,
        found: bytes.len() as u64,
    };
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(truncated(LENGTH_BYTES as u64));
    };
    let announced = u64::from_le_bytes(*length);
    if announced > HEADER_BYTES_MAX as u64 {
        return Err(CheckpointError::HeaderTooLarge {
            file: file(),
            bytes: announced,
            limit: HEADER_BYTES_MAX as u64,
        });
    }
    let header_bytes = announced as usize;
    let Some((header, data)) = rest.split_at_checked(header_bytes) else {
        return Err(truncated(announced + LENGTH_BYTES as u64));
    };
    let entries: Map<String, Value> =
        serde_json::from_slice(header).map_err(|source| CheckpointError::HeaderSyntax {
            file: file(),
            source,
        })?;

    let mut tensors = HashMap::with_capacity(entries.len());
    let mut spans = Vec::with_capacity(entries.len());
    for (name, entry) in entries {
        if name == "__metadata__" {
            continue;
        }
        let info = entry_of(entry).map_err(|source| CheckpointError::Entry {
            file: file(),
            tensor: name.clone(),
            source,
        })?;
        let (begin, end) = info.data_offsets;
        if begin > end {
            return Err(CheckpointError::Backwards {
                file: file(),
                tensor: name,
                begin: begin as u64,
                end: end as u64,
            });
        }
        if end > data.len() {
            return Err(CheckpointError::Outside {
                file: file(),
                tensor: name,
                begin: begin as u64,
                end: end as u64,
                found: data.len() as u64,
            });
        }
        if byte_size(&info) != Some(end - begin) {
            return Err(CheckpointError::Size {
                file: file(),
                tensor: name,
                shape: info.shape,
                dtype: format!("{:?}", info.dtype),
                bytes: (end - begin) as u64,
            });
        }
        spans.push((begin, end, name.clone()));
        let data_start = LENGTH_BYTES + header_bytes;
        tensors.insert(
            name,
            Stored {
                dtype: info.dtype,
                shape: info.shape,
                begin: data_start + begin,
                end: data_start + end,
            },
        );
    }
    check_cover(&file(), spans, data.len())?;
    Ok(tensors)
}

/// The entry, with no field lost: an unknown type or an offset that is no number is an error here.
fn entry_of(entry: Value) -> Result<TensorInfo, serde_json::Error> {
    serde_json::from_value(entry)
}

/// Bytes that shape and type make, or `None` if they overflow or end inside a byte.
fn byte_size(info: &TensorInfo) -> Option<usize> {
    let elements = info
        .shape
        .iter()
        .try_fold(1usize, |product, &size| product.checked_mul(size))?;
    let bits = elements.checked_mul(info.dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// Every byte of the data belongs to exactly one tensor.
fn check_cover(
    file: &str,
    mut spans: Vec<(usize, usize, String)>,
    data_bytes: usize,
) -> Result<(), CheckpointError> {
    spans.sort_unstable();
    let mut covered = 0;
    let mut last: Option<String> = None;
    for (begin, end, name) in spans {
        if begin < covered {
            return Err(CheckpointError::Overlap {
                file: file.to_owned(),
                first: last.unwrap_or_default(),
                second: name,
                at: begin as u64,
            });
        }
        if begin > covered {
            return Err(unclaimed(file, covered, begin));
        }
        covered = end;
        last = Some(name);
    }
    if covered < data_bytes {
        return Err(unclaimed(file, covered, data_bytes));
    }
    Ok(())
}

fn unclaimed(file: &str, begin: usize, end: usize) -> CheckpointError {
    CheckpointError::Unclaimed {
        file: file.to_owned(),
        begin: begin as u64,
        end: end as u64,
    }
}

#[cfg(test)]
mod tests;
