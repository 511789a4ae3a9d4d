//! The certificate of a running process: loaded and looked at, taken up again when it is renewed, and how long it holds.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use metrics::gauge;
use time::OffsetDateTime;
use volley_transports::quic::{Identity, NodeRole, QuicNode, WeakQuicNode};

use crate::failure::Failure;

/// When this process's certificate ends, in seconds since 1970.
pub const EXPIRY: &str = "volley_certificate_expiry_timestamp_seconds";
/// What [`EXPIRY`] says of itself.
pub const EXPIRY_HELP: &str =
    "When this process's certificate ends, in seconds since 1970; 0 if it has none.";

/// Less than this is left: time to renew.
const SOON: Duration = Duration::from_secs(30 * 86_400);
/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// How often a certificate that ends soon is spoken of.
const SPEAK_EVERY: Duration = Duration::from_secs(86_400);
/// What helps.
pub const REMEDY: &str = "`volley certs --out DIR --renew` makes new ones; copy them to this directory, they are taken up without a restart";

/// How long a certificate holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Validity {
    /// For long enough.
    Good,
    /// It is time to renew.
    Soon,
    /// It has ended.
    Ended,
}

/// How long what ends at `expires` still holds, and in words.
pub fn validity(expires: SystemTime, now: SystemTime) -> (Validity, String) {
    let date = OffsetDateTime::from(expires).date();
    match expires.duration_since(now) {
        Ok(left) => {
            let days = left.as_secs() / 86_400;
            let validity = if left < SOON {
                Validity::Soon
            } else {
                Validity::Good
            };
            (validity, format!("ends on {date}, in {days} days"))
        }
        Err(_) => (Validity::Ended, format!("ended on {date}")),
    }
}

/// The identity in `folder`; it must be a `role`'s, and not have ended.
///
/// # Errors
/// There is none, or it is of no use.
pub fn load(folder: &Path, role: NodeRole) -> Result<Identity, Failure> {
    let identity = Identity::load(folder).map_err(|error| Failure::new(error.to_string()))?;
    if identity.role() != role {
        return Err(Failure::new(format!(
            "the certificate in {} is a {}'s, but this process is the {role}; take the directory that `volley certs` made for it",
            folder.display(),
            identity.role()
        )));
    }
    if let (Validity::Ended, when) = validity(identity.expires(), SystemTime::now()) {
        return Err(Failure::new(format!(
            "the certificate in {} {when}; {REMEDY}",
            folder.display()
        )));
    }
    Ok(identity)
}

/// Takes up what changes in `folder` for as long as `node` lives, and warns before its certificate ends.
///
/// # Errors
/// There is no thread for it.
pub fn watch(node: &QuicNode, folder: &Path, identity: &Identity) -> Result<(), Failure> {
    let watcher = Watcher {
        node: node.downgrade(),
        folder: folder.to_owned(),
        role: identity.role(),
        seen: stamps(folder),
        expires: identity.expires(),
    };
    watcher.show();
    std::thread::Builder::new()
        .name("certificate".into())
        .spawn(|| watcher.run())
        .map_err(|error| Failure::new(format!("no thread to watch certificates with: {error}")))?;
    Ok(())
}

/// What is known of each of a folder's files without reading it.
type Stamps = [Option<(SystemTime, u64)>; Identity::FILES.len()];

fn stamps(folder: &Path) -> Stamps {
    Identity::FILES.map(|name| {
        let data = fs::metadata(folder.join(name)).ok()?;
        Some((data.modified().ok()?, data.len()))
    })
}

struct Watcher {
    node: WeakQuicNode,
    folder: PathBuf,
    role: NodeRole,
    seen: Stamps,
    expires: SystemTime,
}

impl Watcher {
    fn run(mut self) {
        let mut spoke: Option<SystemTime> = None;
        loop {
            std::thread::sleep(LOOK_EVERY);
            let Some(node) = self.node.upgrade() else {
                return;
            };
            self.look(&node);
            drop(node);
            let now = SystemTime::now();
            let (validity, when) = validity(self.expires, now);
            let due = spoke.is_none_or(|at| now.duration_since(at).is_ok_and(|d| d >= SPEAK_EVERY));
            if validity != Validity::Good && due {
                spoke = Some(now);
                let folder = self.folder.display();
                tracing::warn!("the certificate in {folder} {when}; {REMEDY}");
            }
        }
    }

    /// Takes up new files, if there are any and they are whole.
    fn look(&mut self, node: &QuicNode) {
        let stamps = stamps(&self.folder);
        if stamps == self.seen {
            return;
        }
        let folder = self.folder.display();
        let identity = match load(&self.folder, self.role) {
            Ok(identity) => identity,
            // Perhaps they are just being written.
            Err(error) => {
                tracing::warn!("the files in {folder} have changed, but are not used: {error}");
                return;
            }
        };
        match node.renew(&identity) {
            Ok(()) => {
                self.seen = stamps;
                self.expires = identity.expires();
                self.show();
                let (_, when) = validity(self.expires, SystemTime::now());
                tracing::info!("the certificate in {folder} is taken up; it {when}");
            }
            Err(error) => tracing::warn!("the certificate in {folder} is not used: {error}"),
        }
    }

    fn show(&self) {
        let since = self.expires.duration_since(SystemTime::UNIX_EPOCH);
        gauge!(EXPIRY).set(since.unwrap_or_default().as_secs_f64());
    }
}

#[cfg(test)]
mod tests {
    use volley_transports::quic::{CertificateAuthority, IssuedCertificate};

    use super::*;

    #[test]
    fn files_that_change_are_taken_up_when_they_are_whole() {
        let folder = tempfile::tempdir().unwrap();
        let authority = CertificateAuthority::new("test").unwrap();
        let day = Duration::from_secs(86_400);
        let issue = |days| authority.issue(NodeRole::Worker, "w", day * days).unwrap();
        let write = |issued: &IssuedCertificate| {
            crate::certs::write_member(folder.path(), authority.certificate_pem(), issued).unwrap();
        };
        write(&issue(1));
        let identity = load(folder.path(), NodeRole::Worker).unwrap();
        let any = std::net::SocketAddr::from(([127, 0, 0, 1], 0));
        let node = QuicNode::bind(any, &identity, Default::default()).unwrap();
        let mut watcher = Watcher {
            node: node.downgrade(),
            folder: folder.path().to_owned(),
            role: NodeRole::Worker,
            seen: stamps(folder.path()),
            expires: identity.expires(),
        };
        let days_left = |watcher: &Watcher| {
            let left = watcher.expires.duration_since(SystemTime::now());
            (left.unwrap().as_secs_f64() / 86_400.0).round()
        };
        watcher.look(&node);
        assert_eq!(days_left(&watcher), 1.0);
        // A key that does not belong to its certificate: not yet whole.
        let next = issue(100);
        fs::write(folder.path().join("node.key"), next.key_pem.clone() + "\n").unwrap();
        watcher.look(&node);
        assert_eq!(days_left(&watcher), 1.0);
        write(&next);
        watcher.look(&node);
        assert_eq!(days_left(&watcher), 100.0);
    }

    #[test]
    fn what_ends_soon_is_told_from_what_has_ended() {
        let day = Duration::from_secs(86_400);
        let now = SystemTime::UNIX_EPOCH + day * 20_000;
        let of = |expires| validity(expires, now);
        assert_eq!(
            of(now + day * 365),
            (Validity::Good, "ends on 2025-10-04, in 365 days".into())
        );
        assert_eq!(of(now + day * 29).0, Validity::Soon);
        assert_eq!(
            of(now - day),
            (Validity::Ended, "ended on 2024-10-03".into())
        );
    }
}
