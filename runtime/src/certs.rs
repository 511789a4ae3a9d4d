//! `volley certs`: an authority for one cluster, certificates for its processes, and what becomes of them: renewed, revoked, listed.
//!
//! The directory is all there is: `ca.pem`, `ca.key`, perhaps `revoked.pem`, and a directory for each member.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use clap::Args;
use serde_json::json;
use time::OffsetDateTime;
use volley_transports::WorkerId;
use volley_transports::quic::{
    CertificateAuthority, Details, IdentityError, IssuedCertificate, NodeRole, details,
    revoked_serials,
};

use crate::certificate::validity;
use crate::failure::Failure;

/// Make, renew, revoke and list certificates of a cluster's processes.
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
    /// Days that members' certificates hold (the authority's holds ten years)
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
    days: u32,
    /// New certificates for the members that there are (all, or those of --worker and --controller)
    #[arg(long, conflicts_with_all = ["revoke", "list"])]
    renew: bool,
    /// Make a member's certificate worth nothing; may be repeated
    #[arg(long, value_name = "NAME", conflicts_with_all = ["list", "worker", "controller"])]
    revoke: Vec<String>,
    /// Show who has a certificate and when it ends
    #[arg(long, conflicts_with_all = ["worker", "controller"])]
    list: bool,
    /// With --list: one JSON object a line
    #[arg(long, requires = "list")]
    json: bool,
}

const AFTER_HELP: &str = "\
Without names it makes one of each role, called `controller`, `worker` and `scheduler`. All workers may share one; the holder of such a one may be any worker.
With --seat each worker gets its own, which is good for its index and no other.

  volley certs --out certs
  volley serve  --isolate host --certificates certs/controller ...
  volley worker expert --index 0 --certificates certs/worker ...

  volley certs --out certs --controller head --seat attention-0 --seat expert-0 --seat expert-1
  volley certs --out certs --list               who there is, and when each certificate ends
  volley certs --out certs --renew              new certificates for all; copy each directory to where it is used
  volley certs --out certs --revoke gpu-7       copy revoked.pem to all members: they refuse gpu-7 from then on

Running processes take up what changes in their directory within seconds. DIR/ca.key signs new members: keep it where no process of the cluster runs.
Each member needs its own directory and nothing else.";

/// Does what is asked.
///
/// # Errors
/// A file cannot be read or written, a member that is to be made is there already, or one that is to be renewed or revoked is not.
pub fn run(args: CertsArgs) -> Result<(), Failure> {
    let (certificate, key) = (args.out.join("ca.pem"), args.out.join("ca.key"));
    if args.list {
        return list(&args.out, args.json);
    }
    let change = args.renew || !args.revoke.is_empty();
    if change && !key.exists() {
        return Err(Failure::new(format!(
            "there is no authority in {}: {} is missing",
            args.out.display(),
            key.display()
        )));
    }
    create(&args.out)?;
    let authority = if key.exists() {
        CertificateAuthority::from_pem(&read(&certificate)?, &read(&key)?).map_err(bad)?
    } else {
        let authority = CertificateAuthority::new(&args.cluster).map_err(bad)?;
        write(&key, authority.key_pem(), 0o600)?;
        write(&certificate, authority.certificate_pem(), 0o644)?;
        authority
    };
    if !args.revoke.is_empty() {
        return args
            .revoke
            .iter()
            .try_for_each(|name| revoke(&args.out, &authority, name));
    }
    let controllers = args
        .controller
        .into_iter()
        .map(|n| (NodeRole::Controller, n));
    let workers = args.worker.into_iter().map(|n| (NodeRole::Worker, n));
    let schedulers = args.scheduler.into_iter();
    let schedulers = schedulers.map(|n| (NodeRole::Scheduler, n));
    let members_named = controllers.chain(workers).chain(schedulers);
    let seats = args.seat.into_iter();
    let seats = seats.map(|seat| (NodeRole::Worker, Some(seat), seat.to_string()));
    let mut named: Vec<(NodeRole, Option<WorkerId>, String)> = members_named
        .map(|(role, name)| (role, None, name))
        .chain(seats)
        .collect();
    if named.is_empty() {
        named = match args.renew {
            true => members(&args.out)?
                .into_iter()
                .map(|(folder, member)| (member.role, member.seat, folder))
                .collect(),
            false => [NodeRole::Controller, NodeRole::Worker, NodeRole::Scheduler]
                .map(|role| (role, None, role.to_string()))
                .into(),
        };
    }
    let validity = Duration::from_secs(86_400 * u64::from(args.days));
    for (role, seat, name) in named {
        make(
            &args.out, &authority, role, seat, &name, validity, args.renew,
        )?;
    }
    Ok(())
}

/// A new certificate for a member, new or known.
fn make(
    out: &Path,
    authority: &CertificateAuthority,
    role: NodeRole,
    mut seat: Option<WorkerId>,
    name: &str,
    validity: Duration,
    renew: bool,
) -> Result<(), Failure> {
    let folder = member_folder(out, name)?;
    if renew {
        let known = details(&read(&folder.join("node.pem"))?).map_err(bad)?;
        if known.role != role {
            return Err(Failure::new(format!(
                "{} is a {}'s certificate, not a {role}'s",
                folder.display(),
                known.role
            )));
        }
        // A certificate of one seat does not become one of any.
        seat = known.seat;
    } else if folder.exists() {
        return Err(Failure::new(format!(
            "{} is there already; --renew makes a new certificate for it, or choose another name",
            folder.display()
        )));
    }
    let issued = match seat {
        Some(seat) => authority.issue_seat(seat, name, validity),
        None => authority.issue(role, name, validity),
    };
    let issued = issued.map_err(bad)?;
    write_member(&folder, authority.certificate_pem(), &issued)?;
    if let Some(list) = revocations(out)? {
        write(&folder.join("revoked.pem"), &list, 0o644)?;
    }
    println!("{}: a {role}'s certificate", folder.display());
    Ok(())
}

/// Puts a member's certificate on the list, and the list into every member's directory.
fn revoke(out: &Path, authority: &CertificateAuthority, name: &str) -> Result<(), Failure> {
    let certificate = read(&member_folder(out, name)?.join("node.pem"))?;
    let list = revocations(out)?;
    let list = authority
        .revoke(list.as_deref(), &certificate)
        .map_err(bad)?;
    write(&out.join("revoked.pem"), &list, 0o644)?;
    for (member, _) in members(out)? {
        write(&out.join(member).join("revoked.pem"), &list, 0o644)?;
    }
    println!(
        "{name} is revoked; copy {} to every member's directory",
        out.join("revoked.pem").display()
    );
    Ok(())
}

/// Shows all members.
fn list(out: &Path, as_json: bool) -> Result<(), Failure> {
    let revoked = revocations(out)?.map_or(Ok(Vec::new()), |list| revoked_serials(&list));
    let revoked = revoked.map_err(bad)?;
    let now = SystemTime::now();
    for (name, member) in members(out)? {
        let is_revoked = revoked.contains(&member.serial);
        let (_, when) = validity(member.expires, now);
        if as_json {
            let days = member
                .expires
                .duration_since(now)
                .map_or(0, |d| d.as_secs() / 86_400);
            let expires = OffsetDateTime::from(member.expires).unix_timestamp();
            let line = json!({"member": name, "role": member.role.to_string(), "expires": expires, "days_left": days, "revoked": is_revoked});
            println!("{line}");
        } else {
            let revoked = if is_revoked { "REVOKED, " } else { "" };
            println!("{name:20} {:10} {revoked}{when}", member.role.to_string());
        }
    }
    Ok(())
}

/// Members by name: directories with a certificate.
fn members(out: &Path) -> Result<Vec<(String, Details)>, Failure> {
    let failed = |error| Failure::new(format!("{} cannot be read: {error}", out.display()));
    let mut members = Vec::new();
    for entry in fs::read_dir(out).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path().join("node.pem");
        if path.exists() {
            let member = details(&read(&path)?)
                .map_err(|error| Failure::new(format!("{}: {error}", path.display())))?;
            members.push((entry.file_name().to_string_lossy().into_owned(), member));
        }
    }
    members.sort_by(|(a, _), (b, _)| a.cmp(b));
    Ok(members)
}

fn member_folder(out: &Path, name: &str) -> Result<PathBuf, Failure> {
    if name.is_empty() || name.contains(['/', '\\']) || name.starts_with('.') {
        return Err(Failure::new(format!(
            "`{name}` cannot be the name of a directory; choose another"
        )));
    }
    Ok(out.join(name))
}

fn revocations(out: &Path) -> Result<Option<String>, Failure> {
    let path = out.join("revoked.pem");
    path.exists().then(|| read(&path)).transpose()
}

fn bad(error: IdentityError) -> Failure {
    Failure::new(error.to_string())
}

/// Writes the directory of one member.
///
/// # Errors
/// A file cannot be written.
pub fn write_member(
    folder: &Path,
    authority_pem: &str,
    issued: &IssuedCertificate,
) -> Result<(), Failure> {
    create(folder)?;
    write(&folder.join("ca.pem"), authority_pem, 0o644)?;
    write(&folder.join("node.key"), &issued.key_pem, 0o600)?;
    write(&folder.join("node.pem"), &issued.certificate_pem, 0o644)
}

fn create(folder: &Path) -> Result<(), Failure> {
    fs::create_dir_all(folder)
        .map_err(|error| Failure::new(format!("{} cannot be made: {error}", folder.display())))
}

fn read(path: &Path) -> Result<String, Failure> {
    fs::read_to_string(path)
        .map_err(|error| Failure::new(format!("{} cannot be read: {error}", path.display())))
}

/// Writes a file so that whoever reads it sees the old one or the new one.
fn write(path: &Path, text: &str, mode: u32) -> Result<(), Failure> {
    let failed = |error| Failure::new(format!("{} cannot be written: {error}", path.display()));
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    // One that was left behind may have other permissions.
    let _ = fs::remove_file(&beside);
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&beside)
        .map_err(failed)?;
    file.write_all(text.as_bytes()).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    fs::rename(&beside, path).map_err(failed)
}
