//! The cluster's own authority: signs what its members prove themselves with, and says which of that is worth nothing any more.

use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose,
    RevokedCertParams, SerialNumber,
};
use rustls::pki_types::CertificateRevocationListDer;
use rustls::pki_types::pem::PemObject;
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::CertificateRevocationList;

use super::identity::{self, Identity, IdentityError, NodeRole, content};
use crate::WorkerId;

/// Hosts' clocks may differ by this much: a certificate holds from so long before it was made.
const CLOCK_SKEW: Duration = Duration::from_secs(3600);
/// How long a list of revocations calls itself current. Members do not hold it against the time: an old list is better than none.
const LIST_LIFE: Duration = Duration::from_secs(365 * 86_400);

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
    /// How long an authority holds: ten years.
    pub const VALIDITY: Duration = Duration::from_secs(10 * 365 * 86_400);

    /// A new one, with a key of its own, that holds for [`CertificateAuthority::VALIDITY`].
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
        valid_for(&mut params, Self::VALIDITY);
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

    /// A certificate for a member that holds from now for `validity`. `name` is for people.
    ///
    /// # Errors
    /// The name cannot stand in a certificate.
    pub fn issue(
        &self,
        role: NodeRole,
        name: &str,
        validity: Duration,
    ) -> Result<IssuedCertificate, IdentityError> {
        self.sign(vec![role.server_name().to_owned()], name, validity)
    }

    /// A worker's certificate that is good for one seat only: its holder cannot pose as another worker.
    ///
    /// # Errors
    /// As [`CertificateAuthority::issue`].
    pub fn issue_seat(
        &self,
        seat: WorkerId,
        name: &str,
        validity: Duration,
    ) -> Result<IssuedCertificate, IdentityError> {
        let role = NodeRole::Worker.server_name();
        let names = vec![role.to_owned(), format!("{seat}.{role}")];
        self.sign(names, name, validity)
    }

    pub(super) fn sign(
        &self,
        names: Vec<String>,
        name: &str,
        validity: Duration,
    ) -> Result<IssuedCertificate, IdentityError> {
        let failed = |error| content("the member's certificate", error);
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = CertificateParams::new(names).map_err(failed)?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        valid_for(&mut params, validity);
        let certificate = params.signed_by(&key, &self.issuer).map_err(failed)?;
        Ok(IssuedCertificate {
            certificate_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        })
    }

    /// A list of revocations, as PEM: that in `list_pem`, if there is one, and `certificate_pem`. Members that have the list refuse who shows such a certificate.
    ///
    /// # Errors
    /// The list or the certificate cannot be read.
    pub fn revoke(
        &self,
        list_pem: Option<&str>,
        certificate_pem: &str,
    ) -> Result<String, IdentityError> {
        let bad = |error: &dyn std::fmt::Display| content("the list of revocations", error);
        let mut serials = list_pem.map_or(Ok(Vec::new()), revoked_serials)?;
        serials.push(identity::details(certificate_pem)?.serial);
        serials.sort();
        serials.dedup();
        let now = SystemTime::now();
        let revoked = |serial: Vec<u8>| RevokedCertParams {
            serial_number: SerialNumber::from(serial),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: (now - CLOCK_SKEW).into(),
            next_update: (now + LIST_LIFE).into(),
            // Lists only grow.
            crl_number: SerialNumber::from(serials.len() as u64),
            issuing_distribution_point: None,
            revoked_certs: serials.into_iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = params.signed_by(&self.issuer).map_err(|e| bad(&e))?;
        list.pem().map_err(|e| bad(&e))
    }

    /// A member's identity without a detour over files: for tests, and for a process that launches its own workers. It holds as long as the authority.
    ///
    /// # Errors
    /// As [`CertificateAuthority::issue`].
    pub fn identity(&self, role: NodeRole, name: &str) -> Result<Identity, IdentityError> {
        let issued = self.issue(role, name, Self::VALIDITY)?;
        Identity::from_pem(
            &self.certificate_pem,
            &issued.certificate_pem,
            &issued.key_pem,
            None,
        )
    }
}

/// Serial numbers of the certificates on a list.
///
/// # Errors
/// It is no list of revocations.
pub fn revoked_serials(list_pem: &str) -> Result<Vec<Vec<u8>>, IdentityError> {
    let bad = |error: &dyn std::fmt::Display| content("the list of revocations", error);
    let list =
        CertificateRevocationListDer::from_pem_slice(list_pem.as_bytes()).map_err(|e| bad(&e))?;
    let (_, list) = CertificateRevocationList::from_der(&list).map_err(|e| bad(&e))?;
    let serials = list.iter_revoked_certificates();
    Ok(serials.map(|entry| entry.serial().to_bytes_be()).collect())
}

fn valid_for(params: &mut CertificateParams, validity: Duration) {
    let now = SystemTime::now();
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + validity).into();
}
