//! `volley certs` over a cluster's life: made, listed, renewed, revoked.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

fn certs(out: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_volley"))
        .args(["certs", "--out"])
        .arg(out)
        .args(args)
        .output()
        .unwrap()
}

fn done(out: &Path, args: &[&str]) {
    let output = certs(out, args);
    assert!(output.status.success(), "{args:?}: {output:?}");
}

fn refused(out: &Path, args: &[&str]) -> String {
    let output = certs(out, args);
    assert_eq!(output.status.code(), Some(1), "{args:?}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

/// Name, role, days left and whether it is revoked, of every member.
fn list(out: &Path) -> Vec<(String, String, u64, bool)> {
    let output = certs(out, &["--list", "--json"]);
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines
        .map(|line| {
            let text = |key: &str| line[key].as_str().unwrap().to_owned();
            let days = line["days_left"].as_u64().unwrap();
            (
                text("member"),
                text("role"),
                days,
                line["revoked"].as_bool().unwrap(),
            )
        })
        .collect()
}

#[test]
fn certificates_are_made_listed_renewed_and_revoked() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("certs");
    let out = out.as_path();
    assert!(refused(out, &["--renew"]).contains("no authority"));
    done(out, &[]);
    done(out, &["--worker", "gpu-7", "--days", "10"]);
    let row = |name: &str, role: &str, days, revoked| (name.into(), role.into(), days, revoked);
    assert_eq!(
        list(out),
        [
            row("controller", "controller", 364, false),
            row("gpu-7", "worker", 9, false),
            row("scheduler", "scheduler", 364, false),
            row("worker", "worker", 364, false)
        ]
    );
    let shown = certs(out, &["--list"]).stdout;
    assert!(String::from_utf8(shown).unwrap().contains("gpu-7"));

    // One member, then all; the authority stays.
    let authority = std::fs::read(out.join("ca.pem")).unwrap();
    let before = std::fs::read(out.join("gpu-7/node.pem")).unwrap();
    done(out, &["--renew", "--worker", "gpu-7", "--days", "100"]);
    assert_ne!(std::fs::read(out.join("gpu-7/node.pem")).unwrap(), before);
    assert_eq!(list(out)[1], row("gpu-7", "worker", 99, false));
    done(out, &["--renew", "--days", "50"]);
    assert!(list(out).iter().all(|(_, _, days, _)| *days == 49));
    assert_eq!(std::fs::read(out.join("ca.pem")).unwrap(), authority);
    assert!(refused(out, &["--renew", "--controller", "gpu-7"]).contains("is a worker's"));
    assert!(refused(out, &["--renew", "--worker", "nobody"]).contains("nobody/node.pem"));

    // Everybody gets the list; a new certificate is not on it.
    done(out, &["--revoke", "gpu-7"]);
    assert_eq!(list(out)[1], row("gpu-7", "worker", 49, true));
    for member in ["controller", "scheduler", "worker", "gpu-7"] {
        assert!(out.join(member).join("revoked.pem").exists(), "{member}");
    }
    done(out, &["--renew", "--worker", "gpu-7"]);
    assert_eq!(list(out)[1], row("gpu-7", "worker", 364, false));
    done(out, &["--worker", "gpu-8"]);
    assert!(out.join("gpu-8/revoked.pem").exists());
}
