//! Facts of the build for `volley --version`.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let var = |name: &str| std::env::var(name).unwrap_or_default();
    let said = |program: &str, args: &[&str]| {
        let output = Command::new(program).args(args).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        (output.status.success() && !text.trim().is_empty()).then(|| text.trim().to_owned())
    };
    // While one develops, a commit should not build the program anew.
    let commit = if var("PROFILE") == "release" {
        for path in ["../.git/HEAD", "../.git/logs/HEAD"] {
            if std::path::Path::new(path).exists() {
                println!("cargo::rerun-if-changed={path}");
            }
        }
        said("git", &["describe", "--always", "--dirty", "--abbrev=10"])
    } else {
        None
    };
    let commit = commit.unwrap_or_else(|| "unknown commit".to_owned());
    let rustc = said(&var("RUSTC"), &["--version"]).unwrap_or_else(|| "unknown rustc".to_owned());
    println!("cargo::rustc-env=VOLLEY_COMMIT={commit}");
    println!("cargo::rustc-env=VOLLEY_RUSTC={rustc}");
    println!("cargo::rustc-env=VOLLEY_TARGET={}", var("TARGET"));
    println!("cargo::rustc-env=VOLLEY_PROFILE={}", var("PROFILE"));
}
