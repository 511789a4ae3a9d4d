//! What this program was built from, and what it found at its start: for `--version`, `GET /version` and bug reports.

use std::sync::LazyLock;

use serde_json::{Value, json};
use volley_models::Isa;

/// `volley --version`: the version, then a fact a line.
pub(crate) static LONG_VERSION: LazyLock<String> = LazyLock::new(|| {
    format!(
        "{}\ncommit:  {}\nbuild:   {} for {}, {}\nkernels: {}",
        env!("CARGO_PKG_VERSION"),
        env!("VOLLEY_COMMIT"),
        env!("VOLLEY_PROFILE"),
        env!("VOLLEY_TARGET"),
        env!("VOLLEY_RUSTC"),
        Isa::detect().instruction_set(),
    )
});

/// The same as JSON.
pub(crate) fn facts() -> Value {
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "commit": env!("VOLLEY_COMMIT"),
        "profile": env!("VOLLEY_PROFILE"),
        "target": env!("VOLLEY_TARGET"),
        "rustc": env!("VOLLEY_RUSTC"),
        "kernels": Isa::detect().instruction_set().to_string(),
    })
}
