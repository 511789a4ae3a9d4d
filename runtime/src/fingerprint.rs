//! What a model's files amount to, so that processes with different ones notice.
//!
//! Reading a few hundred gigabytes at every start would cost minutes. So small files are hashed whole, and of large ones the length, the beginning (where the
//! header with all names and shapes is) and samples spread evenly: another fine-tune differs in all of them.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use volley_actors::Fingerprint;

use crate::config::Settings;
use crate::failure::Failure;

/// Files up to this length are hashed whole.
const WHOLE_MAX: u64 = 4 << 20;
/// Samples of a larger file, and bytes of each.
const SAMPLES: u64 = 64;
const SAMPLE_BYTES: u64 = 4096;

/// What a process of these settings has to agree on with the others of its cluster.
///
/// # Errors
/// A file of the model cannot be read.
pub fn of(settings: &Settings) -> Result<Fingerprint, Failure> {
    let model = &settings.model;
    let hash = of_model(model.path.as_deref(), model.is_dummy())?;
    let print = Fingerprint::new(&settings.cluster, &model.name, &hash);
    Ok(print.and("cluster.transport", settings.transport.name()))
}

/// A hash of the model in `directory`, or of the demo model; with dummy weights, of what they are made from.
///
/// # Errors
/// A file cannot be read.
fn of_model(directory: Option<&Path>, dummy: bool) -> Result<String, Failure> {
    let Some(directory) = directory else {
        return Ok("demo".to_owned());
    };
    let failed = |path: &Path, error: io::Error| {
        Failure::new(format!("{} cannot be read: {error}", path.display()))
    };
    let mut files = Vec::new();
    let entries = std::fs::read_dir(directory).map_err(|error| failed(directory, error))?;
    for entry in entries {
        let path: PathBuf = entry.map_err(|error| failed(directory, error))?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        if extension == Some("json") || (extension == Some("safetensors") && !dummy) {
            files.push(path);
        }
    }
    files.sort();
    let mut hash = Fnv::new();
    for path in files {
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        // Two copies of a model may differ in what is generated when it is first used.
        if name == "generation_config.json" {
            continue;
        }
        hash.bytes(name.as_bytes());
        hash_file(&path, &mut hash).map_err(|error| failed(&path, error))?;
    }
    Ok(format!("{:016x}", hash.0))
}

fn hash_file(path: &Path, hash: &mut Fnv) -> io::Result<()> {
    let mut file = File::open(path)?;
    let len = file.metadata()?.len();
    hash.bytes(&len.to_le_bytes());
    if len <= WHOLE_MAX {
        let mut all = Vec::new();
        file.read_to_end(&mut all)?;
        hash.bytes(&all);
        return Ok(());
    }
    let mut sample = vec![0; SAMPLE_BYTES as usize];
    for at in (0..SAMPLES).map(|i| i * (len - SAMPLE_BYTES) / (SAMPLES - 1)) {
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(&mut sample)?;
        hash.bytes(&sample);
    }
    Ok(())
}

/// FNV-1a, 64 bits: against mistakes, not against malice.
struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Fnv(0xcbf2_9ce4_8422_2325)
    }

    fn bytes(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_content_is_another_hash_and_weights_that_are_not_read_do_not_count() {
        let folder = tempfile::tempdir().unwrap();
        let write =
            |name: &str, bytes: &[u8]| std::fs::write(folder.path().join(name), bytes).unwrap();
        let hash = |dummy| of_model(Some(folder.path()), dummy).unwrap();
        write("config.json", b"{}");
        let mut weights = vec![7; (WHOLE_MAX + 10_000) as usize];
        write("model.safetensors", &weights);
        let (first, dummy) = (hash(false), hash(true));
        write("README.md", b"not part of it");
        assert_eq!(hash(false), first);
        *weights.last_mut().unwrap() = 8;
        write("model.safetensors", &weights);
        assert_ne!(hash(false), first);
        assert_eq!(hash(true), dummy);
        write("config.json", b"{ }");
        assert_ne!(hash(true), dummy);
    }
}
