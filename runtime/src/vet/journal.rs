//! The journal of a search: a line of JSON for each measurement.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::path::Path;

use volley_collie::Record;

use crate::failure::Failure;

/// The measurements of a journal, and the file to append further ones to. A last line that was cut off with the search is dropped.
pub(super) fn journal(path: &Path) -> Result<(Vec<Record>, File), Failure> {
    let (done, whole) = if path.exists() {
        read_journal(path)?
    } else {
        (Vec::new(), 0)
    };
    let open = || -> std::io::Result<File> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        file.set_len(whole)?;
        Ok(file)
    };
    open()
        .map(|file| (done, file))
        .map_err(|error| Failure::file(path, &error))
}

/// The measurements of a journal, and how many bytes its whole lines take.
pub(super) fn read_journal(path: &Path) -> Result<(Vec<Record>, u64), Failure> {
    let (mut done, mut whole, mut line) = (Vec::new(), 0, String::new());
    let file = File::open(path).map_err(|error| Failure::file(path, &error))?;
    let mut reader = BufReader::new(file);
    while reader
        .read_line(&mut line)
        .map_err(|error| Failure::file(path, &error))?
        > 0
        && line.ends_with('\n')
    {
        let record = serde_json::from_str(&line).map_err(|error| {
            Failure::new(format!(
                "{}: line {}: {error}",
                path.display(),
                done.len() + 1
            ))
        })?;
        done.push(record);
        whole += line.len() as u64;
        line.clear();
    }
    Ok((done, whole))
}
