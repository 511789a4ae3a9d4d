//! The network of a cluster of processes, as the configuration says.

use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use volley_models::ModelSpec;
use volley_transports::quic::{Identity, NodeRole, QuicNode, QuicOptions};
use volley_transports::rdma::RdmaFabric;
use volley_transports::{Fabric, Role};

use crate::certificate;
use crate::config::{NetworkSettings, Settings, Transport};
use crate::failure::Failure;
use crate::known_traffic;
use crate::membership::Membership;
use crate::rdma_counters;

/// A peer gets at least so long to be reached.
const CONNECT_MIN: Duration = Duration::from_secs(1);
/// Signs of life in the time after which a silent process is taken for lost.
const KEEP_ALIVES: u32 = 5;

/// The identity in the configured directory; it must be a `role`'s.
///
/// # Errors
/// There is none, or it is of no use.
pub fn identity(settings: &NetworkSettings, role: NodeRole) -> Result<Identity, Failure> {
    let Some(folder) = &settings.certificates else {
        return Err(Failure::new(format!(
            "network.certificates is not set: processes of a cluster prove to each other who they are. `volley certs --out certs` makes what is needed; the {role} then takes --certificates certs/{role}"
        )));
    };
    certificate::load(folder, role)
}

/// How the network is used.
pub fn options(settings: &NetworkSettings) -> QuicOptions {
    QuicOptions {
        connections: settings.connections,
        idle: settings.idle,
        keep_alive: settings.idle / KEEP_ALIVES,
        // A peer that cannot be reached keeps micro-batches waiting just as one that has died does.
        connect: (settings.idle * 2).max(CONNECT_MIN),
        ..QuicOptions::default()
    }
}

/// Where the controller listens, if nothing else is said: on all addresses, at its port.
///
/// # Errors
/// The configured address is none.
pub fn controller_listen(settings: &NetworkSettings) -> Result<SocketAddr, Failure> {
    match &settings.listen {
        Some(listen) => resolve("network.listen", listen),
        None => {
            let port = settings
                .controller
                .rsplit_once(':')
                .and_then(|(_, port)| port.parse().ok());
            let port: u16 =
                port.ok_or_else(|| not_an_address("network.controller", &settings.controller))?;
            Ok(SocketAddr::from(([0, 0, 0, 0], port)))
        }
    }
}

/// Where a worker listens, if nothing else is said: on all addresses, at any free port.
///
/// # Errors
/// The configured address is none.
pub fn worker_listen(settings: &NetworkSettings) -> Result<SocketAddr, Failure> {
    match &settings.listen {
        Some(listen) => resolve("network.listen", listen),
        None => Ok(SocketAddr::from(([0, 0, 0, 0], 0))),
    }
}

/// The address that HOST:PORT stands for now.
///
/// # Errors
/// Names the key, the text and what is wrong with it.
pub fn resolve(key: &str, text: &str) -> Result<SocketAddr, Failure> {
    if text
        .rsplit_once(':')
        .and_then(|(_, port)| port.parse::<u16>().ok())
        .is_none()
    {
        return Err(not_an_address(key, text));
    }
    let mut addresses = text
        .to_socket_addrs()
        .map_err(|error| Failure::new(format!("{key} `{text}` does not resolve: {error}")))?;
    addresses
        .next()
        .ok_or_else(|| Failure::new(format!("{key} `{text}` resolves to no address")))
}

/// Where membership says that the controller is, now.
///
/// # Errors
/// It does not know, or the name does not resolve; in words, since the caller tries again.
pub fn find_controller(membership: &dyn Membership) -> Result<SocketAddr, String> {
    let view = membership.view();
    match (view.controller, view.frozen) {
        (Some(controller), _) => {
            resolve("the controller", &controller).map_err(|error| error.to_string())
        }
        (None, Some(why)) => Err(format!("{} does not answer: {why}", membership.backend())),
        (None, None) => Err(format!(
            "{} knows of no controller yet",
            membership.backend()
        )),
    }
}

fn not_an_address(key: &str, text: &str) -> Failure {
    Failure::new(format!(
        "{key} is `{text}`; it must be HOST:PORT, as in `10.0.0.1:7600`"
    ))
}

/// A node at `listen`, which takes up certificates that are renewed in the configured directory.
///
/// # Errors
/// The address cannot be had.
pub fn bind(
    listen: SocketAddr,
    identity: &Identity,
    settings: &NetworkSettings,
) -> Result<QuicNode, Failure> {
    let node = QuicNode::bind(listen, identity, options(settings))
        .map_err(|error| Failure::new(error.to_string()))?;
    if let Some(folder) = &settings.certificates {
        certificate::watch(&node, folder, identity)?;
    }
    Ok(node)
}

/// What carries rows to other workers, which are met over `node`.
///
/// # Errors
/// RDMA is wanted, but libibverbs or the devices are not there.
pub fn fabric(
    settings: &Settings,
    node: &QuicNode,
    spec: &ModelSpec,
    role: Role,
) -> Result<Arc<dyn Fabric>, Failure> {
    match settings.transport {
        Transport::Quic => Ok(Arc::new(node.clone())),
        Transport::Rdma => {
            let rdma = &settings.rdma;
            let open = |options| {
                RdmaFabric::open(node.clone(), options, rdma.spin).map_err(|error| {
                    Failure::new(format!("cluster.transport is `rdma`, but {error}"))
                })
            };
            let mut fabric = open(rdma.options.clone())?;
            if let Some(path) = &rdma.known_anomalies {
                let known = known_traffic::load(path)?;
                let topology = settings.cluster.topology(spec)?;
                let (options, mtu) = (&rdma.options, fabric.mtu());
                let (options, changes) =
                    known_traffic::clear(&known, &topology, role, options, mtu, rdma.avoid)?;
                for change in &changes {
                    tracing::warn!("rows keep clear of a known anomaly: {change}");
                }
                if !changes.is_empty() {
                    fabric = open(options.clone())?;
                    // A port takes no larger packets because it is asked to.
                    known_traffic::clear(&known, &topology, role, &options, fabric.mtu(), false)?;
                }
            }
            rdma_counters::watch(fabric.rails());
            tracing::info!("rows travel by {fabric:?}");
            Ok(Arc::new(fabric))
        }
    }
}
