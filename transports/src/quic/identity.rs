//! Who a process is: certificates of the cluster's own authority, with the role in them.

use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{
    CertificateDer, CertificateRevocationListDer, PrivateKeyDer, PrivatePkcs8KeyDer,
};
use rustls::server::WebPkiClientVerifier;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::WorkerId;

/// Every name in our certificates ends with this. It is no host's name: certificates say what a process is, not where.
const DOMAIN: &str = "volley.internal";

/// What a certificate entitles to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NodeRole {
    /// Frontend, scheduler and supervisor: gives workers their work.
    Controller,
    /// Attention or expert worker: joins a controller, and exchanges rows with other workers.
    Worker,
    /// Plans steps for a controller. It is told lengths of sequences, never tokens, and gets no rows.
    Scheduler,
}

impl NodeRole {
    const ALL: [NodeRole; 3] = [Self::Controller, Self::Worker, Self::Scheduler];

    /// The name that stands in certificates of this role, and that callers ask for.
    pub(super) const fn server_name(self) -> &'static str {
        match self {
            Self::Controller => "controller.volley.internal",
            Self::Worker => "worker.volley.internal",
            Self::Scheduler => "scheduler.volley.internal",
        }
    }
}

impl std::fmt::Display for NodeRole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Controller => "controller",
            Self::Worker => "worker",
            Self::Scheduler => "scheduler",
        })
    }
}

/// Why a certificate or key is of no use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// A file cannot be read or written.
    #[error("{path}: {error}; `volley certs` makes certificates")]
    File {
        /// Which.
        path: String,
        /// What the system says.
        error: std::io::Error,
    },
    /// A file's content is of no use.
    #[error("{what}: {reason}; `volley certs` makes certificates")]
    Content {
        /// Which part.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
}

pub(super) fn content(what: &str, reason: impl ToString) -> IdentityError {
    IdentityError::Content {
        what: what.to_owned(),
        reason: reason.to_string(),
    }
}

/// What a process proves who it is with, and whom it trusts.
#[derive(Clone)]
pub struct Identity {
    role: NodeRole,
    seat: Option<WorkerId>,
    name: String,
    expires: SystemTime,
    server: Arc<rustls::ServerConfig>,
    client: Arc<rustls::ClientConfig>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({} {})", self.role, self.name)
    }
}

impl Identity {
    /// From the authority's certificate, the process's own certificate and key, and the list of revocations, if there is one.
    ///
    /// # Errors
    /// One of them is of no use, or the certificate has no role.
    pub fn from_pem(
        authority_pem: &str,
        certificate_pem: &str,
        key_pem: &str,
        revoked_pem: Option<&str>,
    ) -> Result<Self, IdentityError> {
        let authority = CertificateDer::from_pem_slice(authority_pem.as_bytes())
            .map_err(|error| content("the authority's certificate", error))?;
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|error| content("the certificate", error))?;
        let key = PrivatePkcs8KeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|error| content("the key", error))?;
        let Details {
            role,
            seat,
            name,
            expires,
            ..
        } = read(&certificate).map_err(|reason| content("the certificate", reason))?;
        let revoked = revoked_pem
            .map(|list| CertificateRevocationListDer::from_pem_slice(list.as_bytes()))
            .transpose()
            .map_err(|error| content("the list of revocations", error))?;

        let mut roots = RootCertStore::empty();
        roots
            .add(authority)
            .map_err(|error| content("the authority's certificate", error))?;
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain = vec![certificate];
        let bad = |error| content("certificate and key", error);
        let unusable = |error: &dyn std::fmt::Display| {
            content(
                "the authority's certificate or the list of revocations",
                error,
            )
        };
        // Both directions look at the same list. Without one nothing is revoked.
        let clients =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .with_crls(revoked.clone())
                .build()
                .map_err(|error| unusable(&error))?;
        let servers =
            WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .with_crls(revoked)
                .build()
                .map_err(|error| unusable(&error))?;
        let versions = &[&rustls::version::TLS13];
        let mut server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .map_err(bad)?
            .with_client_cert_verifier(clients)
            .with_single_cert(chain.clone(), PrivateKeyDer::Pkcs8(key.clone_key()))
            .map_err(bad)?;
        let mut client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(bad)?
            .with_webpki_verifier(servers)
            .with_client_auth_cert(chain, PrivateKeyDer::Pkcs8(key))
            .map_err(bad)?;
        server.alpn_protocols = vec![super::hello::ALPN.to_vec()];
        client.alpn_protocols = vec![super::hello::ALPN.to_vec()];
        // A resumed session is of no use to connections that last, and early data could be replayed.
        client.resumption = rustls::client::Resumption::disabled();
        Ok(Self {
            role,
            seat,
            name,
            expires,
            server: Arc::new(server),
            client: Arc::new(client),
        })
    }

    /// Files of an identity's folder. The last need not be there.
    pub const FILES: [&'static str; 4] = ["ca.pem", "node.pem", "node.key", "revoked.pem"];

    /// From a folder with [`Identity::FILES`], as `volley certs` makes them.
    ///
    /// # Errors
    /// Names the file and what is wrong with it.
    pub fn load(folder: &Path) -> Result<Self, IdentityError> {
        let read = |name: &str| {
            let path = folder.join(name);
            std::fs::read_to_string(&path).map_err(|error| IdentityError::File {
                path: path.display().to_string(),
                error,
            })
        };
        let [authority, certificate, key, revoked] = Self::FILES.map(read);
        let revoked = match revoked {
            Err(IdentityError::File { error, .. }) if error.kind() == ErrorKind::NotFound => None,
            other => Some(other?),
        };
        let identity = Self::from_pem(&authority?, &certificate?, &key?, revoked.as_deref());
        identity.map_err(|error| match error {
            IdentityError::Content { what, reason } => IdentityError::Content {
                what: format!("{what} in {}", folder.display()),
                reason,
            },
            other => other,
        })
    }

    /// What the certificate entitles to.
    pub fn role(&self) -> NodeRole {
        self.role
    }

    /// The one worker it may be, if the certificate says so.
    pub fn seat(&self) -> Option<WorkerId> {
        self.seat
    }

    /// The name in the certificate.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// When the certificate ends.
    pub fn expires(&self) -> SystemTime {
        self.expires
    }

    /// How it takes calls: TLS 1.3 that asks for the caller's certificate.
    pub fn server(&self) -> Arc<rustls::ServerConfig> {
        Arc::clone(&self.server)
    }

    /// How it calls.
    pub fn client(&self) -> Arc<rustls::ClientConfig> {
        Arc::clone(&self.client)
    }
}

/// What stands in a member's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Details {
    /// What it entitles to.
    pub role: NodeRole,
    /// The one worker it may be; any if none.
    pub seat: Option<WorkerId>,
    /// The member's name.
    pub name: String,
    /// When it ends.
    pub expires: SystemTime,
    /// Its number, by which it is revoked.
    pub serial: Vec<u8>,
}

/// What stands in a member's certificate.
///
/// # Errors
/// It is not a member's certificate.
pub fn details(certificate_pem: &str) -> Result<Details, IdentityError> {
    let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
        .map_err(|error| content("the certificate", error))?;
    read(&certificate).map_err(|reason| content("the certificate", reason))
}

pub(super) fn read(certificate: &CertificateDer<'_>) -> Result<Details, String> {
    let (_, certificate) = X509Certificate::from_der(certificate)
        .map_err(|error| format!("it cannot be read: {error}"))?;
    let names = certificate
        .subject_alternative_name()
        .map_err(|error| format!("its names cannot be read: {error}"))?;
    let names = names
        .map(|names| names.value.general_names.as_slice())
        .unwrap_or_default();
    let hosts = names.iter().filter_map(|name| match name {
        GeneralName::DNSName(name) => Some(*name),
        _ => None,
    });
    let role = hosts.clone().find_map(|name| {
        let mut roles = NodeRole::ALL.into_iter();
        roles.find(|role| role.server_name() == name)
    });
    let mut seat = None;
    for name in hosts {
        let of_worker = name.strip_suffix(NodeRole::Worker.server_name());
        if let Some(of) = of_worker.and_then(|rest| rest.strip_suffix('.')) {
            let worker = of.parse::<WorkerId>();
            // One that cannot be read must not be taken for "any".
            seat = Some(worker.map_err(|error| format!("it is for the seat `{of}`: {error}"))?);
        }
    }
    let role = role.ok_or_else(|| {
        format!(
            "it names no role: one of its DNS names must be controller.{DOMAIN}, worker.{DOMAIN} or scheduler.{DOMAIN}"
        )
    })?;
    let common = certificate.subject().iter_common_name().next();
    let common = common
        .and_then(|name| name.as_str().ok())
        .unwrap_or("unnamed");
    let expires = certificate.validity().not_after.timestamp();
    Ok(Details {
        role,
        seat,
        name: common.to_owned(),
        // Before 1970 is as good as then.
        expires: SystemTime::UNIX_EPOCH + Duration::from_secs(expires.try_into().unwrap_or(0)),
        serial: certificate.serial.to_bytes_be(),
    })
}

#[cfg(test)]
mod tests {
    use super::super::CertificateAuthority;
    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn an_authority_survives_its_files_and_issues_roles() {
        let authority = CertificateAuthority::new("test").unwrap();
        let again =
            CertificateAuthority::from_pem(authority.certificate_pem(), authority.key_pem())
                .unwrap();
        for (of, role) in [
            (&authority, NodeRole::Worker),
            (&again, NodeRole::Controller),
            (&again, NodeRole::Scheduler),
        ] {
            let identity = of.identity(role, "host-7").unwrap();
            assert_eq!((identity.role(), identity.name()), (role, "host-7"));
        }
    }

    #[test]
    fn a_certificate_of_one_seat_says_which() {
        let authority = CertificateAuthority::new("test").unwrap();
        let seat = crate::Role::Expert.worker(12);
        let issued = authority.issue_seat(seat, "host-7", DAY).unwrap();
        let ca = authority.certificate_pem();
        let of = |of: &super::super::IssuedCertificate| {
            Identity::from_pem(ca, &of.certificate_pem, &of.key_pem, None)
        };
        let identity = of(&issued).unwrap();
        assert_eq!(
            (identity.role(), identity.seat()),
            (NodeRole::Worker, Some(seat))
        );
        // A seat that cannot be read is not taken for "any".
        let names = ["worker.volley.internal", "expert-x.worker.volley.internal"];
        let odd = authority
            .sign(names.map(str::to_owned).to_vec(), "odd", DAY)
            .unwrap();
        let refused = of(&odd).unwrap_err();
        assert!(refused.to_string().contains("`expert-x`"), "{refused}");
    }

    #[test]
    fn a_certificate_says_when_it_ends() {
        let authority = CertificateAuthority::new("test").unwrap();
        let before = SystemTime::now();
        let issued = authority.issue(NodeRole::Worker, "a", 30 * DAY).unwrap();
        let expires = details(&issued.certificate_pem).unwrap().expires;
        // Certificates know no fractions of a second.
        assert!(expires > before + 30 * DAY - Duration::from_secs(2));
        assert!(expires <= SystemTime::now() + 30 * DAY);
    }

    #[test]
    fn revocations_add_up() {
        let authority = CertificateAuthority::new("test").unwrap();
        let [one, two] =
            ["a", "b"].map(|name| authority.issue(NodeRole::Worker, name, DAY).unwrap());
        let list = authority.revoke(None, &one.certificate_pem).unwrap();
        let list = authority.revoke(Some(&list), &two.certificate_pem).unwrap();
        let again = authority.revoke(Some(&list), &two.certificate_pem).unwrap();
        let serials = |list: &str| super::super::authority::revoked_serials(list).unwrap();
        let mut expected = [&one, &two].map(|of| details(&of.certificate_pem).unwrap().serial);
        expected.sort();
        assert_eq!(
            (serials(&list), serials(&again)),
            (expected.to_vec(), expected.to_vec())
        );
    }

    #[test]
    fn what_is_no_identity_is_refused_by_name() {
        let authority = CertificateAuthority::new("test").unwrap();
        let one = authority.issue(NodeRole::Worker, "a", DAY).unwrap();
        let two = authority.issue(NodeRole::Worker, "b", DAY).unwrap();
        let of = |ca: &str, certificate: &str, key: &str, revoked: Option<&str>| {
            Identity::from_pem(ca, certificate, key, revoked)
                .unwrap_err()
                .to_string()
        };
        let ca = authority.certificate_pem();
        let (pem, key) = (&one.certificate_pem, &one.key_pem);
        assert!(of(ca, "nonsense", key, None).starts_with("the certificate:"));
        assert!(of(ca, pem, "nonsense", None).starts_with("the key:"));
        assert!(of(ca, pem, &two.key_pem, None).starts_with("certificate and key:"));
        assert!(of(ca, ca, key, None).contains("names no role"));
        assert!(of(ca, pem, key, Some("nonsense")).starts_with("the list of revocations:"));
        let missing = Identity::load(Path::new("/nowhere"))
            .unwrap_err()
            .to_string();
        assert!(missing.starts_with("/nowhere/ca.pem"), "{missing}");
    }
}
