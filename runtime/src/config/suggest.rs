//! "Did you mean": the key that somebody probably wanted.

use super::keys::{self, KEYS};

/// The path of the known key closest to `path`, if one is close enough to be what was meant.
pub(crate) fn key(path: &str) -> Option<&'static str> {
    // The right name in the wrong section is a slip of the section, however different the sections are.
    let name = path.rsplit('.').next().unwrap_or(path);
    let misplaced = KEYS
        .iter()
        .find(|key| key.name() == name)
        .map(|key| key.path);
    misplaced
        .or_else(|| nearest(path, KEYS.iter().map(|key| key.path)))
        .or_else(|| {
            let nearest_name = nearest(name, KEYS.iter().map(|key| key.name()))?;
            KEYS.iter()
                .find(|key| key.name() == nearest_name)
                .map(|key| key.path)
        })
}

/// The section closest to `name`.
pub(crate) fn section(name: &str) -> Option<&'static str> {
    nearest(name, keys::sections().into_iter())
}

/// The candidate within a third of the word's letters in edits (a transposition is one edit), the closest first.
fn nearest<'a>(word: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let normal = word.to_lowercase().replace('-', "_");
    let edits_max = (normal.len() / 3).max(1);
    candidates
        .map(|candidate| (strsim::damerau_levenshtein(&normal, candidate), candidate))
        .filter(|(edits, _)| *edits <= edits_max)
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_find_their_key_and_nonsense_finds_none() {
        for (typed, meant) in [
            ("server.prot", Some("server.port")),
            ("server.api-key-file", Some("server.api_key_file")),
            (
                "cluster.attention_worker",
                Some("cluster.attention_workers"),
            ),
            ("cluster.max_waiting", Some("limits.max_waiting")),
            ("port", Some("server.port")),
            ("Server.Port", Some("server.port")),
            ("server.tensor_parallel_size", None),
        ] {
            assert_eq!(key(typed), meant, "{typed}");
        }
        assert_eq!(section("severs"), Some("server"));
        assert_eq!(section("kubernetes"), None);
    }
}
