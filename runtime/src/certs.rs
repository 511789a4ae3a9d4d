//! `volley certs`: an authority for one cluster, and certificates for its processes.

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use clap::Args;
use volley_transports::WorkerId;
use volley_transports::quic::{CertificateAuthority, NodeRole};

use crate::failure::Failure;

/// Make certificates for the processes of a cluster.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct CertsArgs {
    /// Directory to write to; an authority that is there already is used again
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Name of the cluster, for people
    #[arg(long, value_name = "NAME", default_value = "volley")]
    cluster: String,
    /// A member that may only be a worker; may be repeated
    #[arg(long, value_name = "NAME")]
    worker: Vec<String>,
    /// A worker that may be this one only, as in `expert-3`; may be repeated
    #[arg(long, value_name = "WORKER")]
    seat: Vec<WorkerId>,
    /// A member that may only be a scheduler (`volley scheduler`); may be repeated
    #[arg(long, value_name = "NAME")]
    scheduler: Vec<String>,
    /// A member that may be the controller (`volley serve`); may be repeated
    #[arg(long, value_name = "NAME")]
    controller: Vec<String>,
}

const AFTER_HELP: &str = "\
Without names it makes one of each role, called `controller`, `worker` and `scheduler`. All workers may share one; the holder of such a one may be any worker.
With --seat each worker gets its own, which is good for its index and no other.

  volley certs --out certs
  volley serve  --isolate host --certificates certs/controller ...
  volley worker expert --index 0 --certificates certs/worker ...

  volley certs --out certs --controller head --seat attention-0 --seat expert-0 --seat expert-1

DIR/ca.key signs new members: keep it where no process of the cluster runs. Each member needs its own directory and nothing else.";

/// Writes what is missing.
///
/// # Errors
/// A file cannot be written, or a member is there already.
pub fn run(args: CertsArgs) -> Result<(), Failure> {
    let bad = |error: volley_transports::quic::IdentityError| Failure::new(error.to_string());
    let (certificate, key) = (args.out.join("ca.pem"), args.out.join("ca.key"));
    create(&args.out)?;
    let authority = if key.exists() {
        CertificateAuthority::from_pem(&read(&certificate)?, &read(&key)?).map_err(bad)?
    } else {
        let authority = CertificateAuthority::new(&args.cluster).map_err(bad)?;
        write(&key, authority.key_pem(), 0o600)?;
        write(&certificate, authority.certificate_pem(), 0o644)?;
        authority
    };
    let mut members: Vec<(NodeRole, String)> = Vec::new();
    members.extend(
        args.controller
            .into_iter()
            .map(|name| (NodeRole::Controller, name)),
    );
    members.extend(args.worker.into_iter().map(|name| (NodeRole::Worker, name)));
    let schedulers = args.scheduler.into_iter();
    members.extend(schedulers.map(|name| (NodeRole::Scheduler, name)));
    if members.is_empty() && args.seat.is_empty() {
        members = [NodeRole::Controller, NodeRole::Worker, NodeRole::Scheduler]
            .map(|role| (role, role.to_string()))
            .into();
    }
    let members = members.into_iter().map(|(role, name)| (role, None, name));
    let seats = args.seat.into_iter();
    let seats = seats.map(|seat| (NodeRole::Worker, Some(seat), seat.to_string()));
    for (role, seat, name) in members.chain(seats) {
        if name.contains(['/', '\\']) || name.starts_with('.') {
            return Err(Failure::new(format!(
                "`{name}` cannot be the name of a directory; choose another"
            )));
        }
        let folder = args.out.join(&name);
        if folder.exists() {
            return Err(Failure::new(format!(
                "{} is there already; remove it to make a new certificate, or choose another name",
                folder.display()
            )));
        }
        let issued = match seat {
            Some(seat) => authority.issue_seat(seat, &name),
            None => authority.issue(role, &name),
        };
        let issued = issued.map_err(bad)?;
        write_member(&folder, authority.certificate_pem(), &issued)?;
        println!("{}: a {role}'s certificate", folder.display());
    }
    Ok(())
}

/// Writes the directory of one member.
///
/// # Errors
/// A file cannot be written.
pub fn write_member(
    folder: &Path,
    authority_pem: &str,
    issued: &volley_transports::quic::IssuedCertificate,
) -> Result<(), Failure> {
    create(folder)?;
    write(&folder.join("ca.pem"), authority_pem, 0o644)?;
    write(&folder.join("node.pem"), &issued.certificate_pem, 0o644)?;
    write(&folder.join("node.key"), &issued.key_pem, 0o600)
}

fn create(folder: &Path) -> Result<(), Failure> {
    std::fs::create_dir_all(folder)
        .map_err(|error| Failure::new(format!("{} cannot be made: {error}", folder.display())))
}

fn read(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path)
        .map_err(|error| Failure::new(format!("{} cannot be read: {error}", path.display())))
}

fn write(path: &Path, text: &str, mode: u32) -> Result<(), Failure> {
    let failed = |error| Failure::new(format!("{} cannot be written: {error}", path.display()));
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)
}
