//! Who a process is: certificates of the cluster's own authority, with the role in them.

use std::path::Path;
use std::sync::Arc;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
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

fn content(what: &str, reason: impl ToString) -> IdentityError {
    IdentityError::Content {
        what: what.to_owned(),
        reason: reason.to_string(),
    }
}

/// The authority that signs the certificates of one cluster. Whoever has its key can add members.
pub struct CertificateAuthority {
    issuer: Issuer<'static, KeyPair>,
    certificate_pem: String,
    key_pem: String,
}

/// A certificate and its key, as PEM.
pub struct IssuedCertificate {
    /// The certificate.
    pub certificate_pem: String,
    /// Its private key.
    pub key_pem: String,
}

impl CertificateAuthority {
    /// A new one, with a key of its own.
    ///
    /// # Errors
    /// The name cannot stand in a certificate.
    pub fn new(cluster: &str) -> Result<Self, IdentityError> {
        let failed = |error| content("the cluster's certificate", error);
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, format!("Volley cluster {cluster}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key).map_err(failed)?;
        let (certificate_pem, key_pem) = (certificate.pem(), key.serialize_pem());
        Ok(Self {
            issuer: Issuer::new(params, key),
            certificate_pem,
            key_pem,
        })
    }

    /// The one whose certificate and key are these PEM texts.
    ///
    /// # Errors
    /// They are not a certificate and its key.
    pub fn from_pem(certificate_pem: &str, key_pem: &str) -> Result<Self, IdentityError> {
        let key =
            KeyPair::from_pem(key_pem).map_err(|error| content("the authority's key", error))?;
        let issuer = Issuer::from_ca_cert_pem(certificate_pem, key)
            .map_err(|error| content("the authority's certificate", error))?;
        Ok(Self {
            issuer,
            certificate_pem: certificate_pem.to_owned(),
            key_pem: key_pem.to_owned(),
        })
    }

    /// Its certificate, which every member has.
    pub fn certificate_pem(&self) -> &str {
        &self.certificate_pem
    }

    /// Its private key, which no member needs.
    pub fn key_pem(&self) -> &str {
        &self.key_pem
    }

    /// A certificate for a member. `name` is for people.
    ///
    /// # Errors
    /// The name cannot stand in a certificate.
    pub fn issue(&self, role: NodeRole, name: &str) -> Result<IssuedCertificate, IdentityError> {
        self.sign(vec![role.server_name().to_owned()], name)
    }

    /// A worker's certificate that is good for one seat only: its holder cannot pose as another worker.
    ///
    /// # Errors
    /// As [`CertificateAuthority::issue`].
    pub fn issue_seat(
        &self,
        seat: WorkerId,
        name: &str,
    ) -> Result<IssuedCertificate, IdentityError> {
        let role = NodeRole::Worker.server_name();
        self.sign(vec![role.to_owned(), format!("{seat}.{role}")], name)
    }

    fn sign(&self, names: Vec<String>, name: &str) -> Result<IssuedCertificate, IdentityError> {
        let failed = |error| content("the member's certificate", error);
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = CertificateParams::new(names).map_err(failed)?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok(IssuedCertificate {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    /// A member's identity without a detour over files: for tests, and for a process that launches its own workers.
    ///
    /// # Errors
    /// As [`CertificateAuthority::issue`].
    pub fn identity(&self, role: NodeRole, name: &str) -> Result<Identity, IdentityError> {
        let issued = self.issue(role, name)?;
        Identity::from_pem(
            &self.certificate_pem,
            &issued.certificate_pem,
            &issued.key_pem,
        )
    }
}

/// What a process proves who it is with, and whom it trusts.
#[derive(Clone)]
pub struct Identity {
    claims: Claims,
    server: Arc<rustls::ServerConfig>,
    client: Arc<rustls::ClientConfig>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({} {})", self.claims.role, self.claims.name)
    }
}

impl Identity {
    /// From the authority's certificate and the process's own certificate and key.
    ///
    /// # Errors
    /// One of them is of no use, or the certificate has no role.
    pub fn from_pem(
        authority_pem: &str,
        certificate_pem: &str,
        key_pem: &str,
    ) -> Result<Self, IdentityError> {
        let authority = CertificateDer::from_pem_slice(authority_pem.as_bytes())
            .map_err(|error| content("the authority's certificate", error))?;
        let certificate = CertificateDer::from_pem_slice(certificate_pem.as_bytes())
            .map_err(|error| content("the certificate", error))?;
        let key = PrivatePkcs8KeyDer::from_pem_slice(key_pem.as_bytes())
            .map_err(|error| content("the key", error))?;
        let claims = read(&certificate).map_err(|reason| content("the certificate", reason))?;

        let mut roots = RootCertStore::empty();
        roots
            .add(authority)
            .map_err(|error| content("the authority's certificate", error))?;
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let chain = vec![certificate];
        let bad = |error| content("certificate and key", error);
        let verifier =
            WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
                .build()
                .map_err(|error| content("the authority's certificate", error))?;
        let versions = &[&rustls::version::TLS13];
        let mut server = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .map_err(bad)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), PrivateKeyDer::Pkcs8(key.clone_key()))
            .map_err(bad)?;
        let mut client = rustls::ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(bad)?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, PrivateKeyDer::Pkcs8(key))
            .map_err(bad)?;
        server.alpn_protocols = vec![super::hello::ALPN.to_vec()];
        client.alpn_protocols = vec![super::hello::ALPN.to_vec()];
        // A resumed session is of no use to connections that last, and early data could be replayed.
        client.resumption = rustls::client::Resumption::disabled();
        Ok(Self {
            claims,
            server: Arc::new(server),
            client: Arc::new(client),
        })
    }

    /// From a folder with `ca.pem`, `node.pem` and `node.key`, as `volley certs` makes them.
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
        let (authority, certificate, key) = (read("ca.pem")?, read("node.pem")?, read("node.key")?);
        Self::from_pem(&authority, &certificate, &key).map_err(|error| match error {
            IdentityError::Content { what, reason } => IdentityError::Content {
                what: format!("{what} in {}", folder.display()),
                reason,
            },
            other => other,
        })
    }

    /// What the certificate entitles to.
    pub fn role(&self) -> NodeRole {
        self.claims.role
    }

    /// The one worker it may be, if the certificate says so.
    pub fn seat(&self) -> Option<WorkerId> {
        self.claims.seat
    }

    /// The name in the certificate.
    pub fn name(&self) -> &str {
        &self.claims.name
    }

    pub(super) fn server(&self) -> Arc<rustls::ServerConfig> {
        Arc::clone(&self.server)
    }

    pub(super) fn client(&self) -> Arc<rustls::ClientConfig> {
        Arc::clone(&self.client)
    }
}

/// What a certificate says of its holder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Claims {
    pub(super) role: NodeRole,
    /// The one worker it may be; any if none.
    pub(super) seat: Option<WorkerId>,
    /// For people.
    pub(super) name: String,
}

/// Reads a certificate that is known to be signed by the authority.
pub(super) fn read(certificate: &CertificateDer<'_>) -> Result<Claims, String> {
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
    let common = certificate.subject().iter_common_name().next();
    let common = common
        .and_then(|name| name.as_str().ok())
        .unwrap_or("unnamed");
    let role = role.ok_or_else(|| {
        format!(
            "it names no role: one of its DNS names must be controller.{DOMAIN}, worker.{DOMAIN} or scheduler.{DOMAIN}"
        )
    })?;
    Ok(Claims {
        role,
        seat,
        name: common.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

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
            assert_eq!(identity.seat(), None);
        }
    }

    #[test]
    fn a_certificate_of_one_seat_says_which() {
        let authority = CertificateAuthority::new("test").unwrap();
        let seat = crate::Role::Expert.worker(12);
        let issued = authority.issue_seat(seat, "host-7").unwrap();
        let ca = authority.certificate_pem();
        let identity = Identity::from_pem(ca, &issued.certificate_pem, &issued.key_pem).unwrap();
        assert_eq!(
            (identity.role(), identity.seat()),
            (NodeRole::Worker, Some(seat))
        );
        // A seat that cannot be read is not taken for "any".
        let names = ["worker.volley.internal", "expert-x.worker.volley.internal"];
        let odd = authority
            .sign(names.map(str::to_owned).to_vec(), "odd")
            .unwrap();
        let refused = Identity::from_pem(ca, &odd.certificate_pem, &odd.key_pem).unwrap_err();
        assert!(refused.to_string().contains("`expert-x`"), "{refused}");
    }

    #[test]
    fn what_is_no_identity_is_refused_by_name() {
        let authority = CertificateAuthority::new("test").unwrap();
        let one = authority.issue(NodeRole::Worker, "a").unwrap();
        let two = authority.issue(NodeRole::Worker, "b").unwrap();
        let of = |ca: &str, certificate: &str, key: &str| {
            Identity::from_pem(ca, certificate, key)
                .unwrap_err()
                .to_string()
        };
        let ca = authority.certificate_pem();
        assert!(of(ca, "nonsense", &one.key_pem).starts_with("the certificate:"));
        assert!(of(ca, &one.certificate_pem, "nonsense").starts_with("the key:"));
        assert!(of(ca, &one.certificate_pem, &two.key_pem).starts_with("certificate and key:"));
        assert!(of(ca, ca, &one.key_pem).contains("names no role"));
        let missing = Identity::load(Path::new("/nowhere"))
            .unwrap_err()
            .to_string();
        assert!(missing.starts_with("/nowhere/ca.pem"), "{missing}");
    }
}
