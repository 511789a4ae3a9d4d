//! One process's place in the network: a socket, who it is, and what it expects.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;

use quinn::{Connection, Endpoint, TransportConfig, VarInt};
use tokio::runtime::Runtime;
use tokio::sync::{Mutex as AsyncMutex, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::QuicError;
use super::control::{ControlLink, Peer};
use super::fabric::{self, Leave, PeerSide, QuicEndpoint};
use super::hello::{Carrier, DataHello, Hello, LEFT, REASON_MAX, REFUSED, TAKEN};
use super::identity::{self, Identity, NodeRole};
use super::setup::{self, LANES_MAX, Window};
use super::welcome::{Arrived, CALLERS_MAX, LINKS_WAITING_MAX, STRANGERS_MAX, serve_as_called};
use crate::ball::Spin;
use crate::{Epoch, LostReason, Role, Topology, WorkerId};

/// Pause before a peer that could not be reached is called again.
const REDIAL: Duration = Duration::from_millis(50);
/// A datagram size that has not grown for so long is what the path takes.
const MTU_SETTLED: Duration = Duration::from_millis(500);
/// Longest time that a probe looks for larger datagrams.
pub(super) const MTU_SEARCH: Duration = Duration::from_secs(3);

/// How a node uses the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QuicOptions {
    /// Connections of each pair of attention and expert worker. One connection is encrypted by one core at a time.
    pub connections: u8,
    /// Threads of the node.
    pub threads: usize,
    /// How often a silent connection shows that it lives.
    pub keep_alive: Duration,
    /// After this long without a sign of life a connection is lost.
    pub idle: Duration,
    /// How long a peer may take to be reached and to answer a hello.
    pub connect: Duration,
}

impl Default for QuicOptions {
    fn default() -> Self {
        Self {
            connections: 2,
            threads: 2,
            keep_alive: Duration::from_millis(160),
            idle: Duration::from_millis(800),
            connect: Duration::from_secs(5),
        }
    }
}

/// See the module. Clones are the same node; it ends, with its control links, with the last of them and of its endpoints.
#[derive(Clone)]
pub struct QuicNode(Arc<Inner>);

/// A node that may have ended; does not keep it.
#[derive(Clone)]
pub struct WeakQuicNode(Weak<Inner>);

impl WeakQuicNode {
    /// The node, if it is still there.
    pub fn upgrade(&self) -> Option<QuicNode> {
        self.0.upgrade().map(QuicNode)
    }
}

struct Inner {
    shared: Arc<Shared>,
    address: SocketAddr,
    links: AsyncMutex<mpsc::Receiver<ControlLink>>,
    runtime: Option<Runtime>,
}

/// What the node's tasks share.
pub(super) struct Shared {
    pub(super) endpoint: Endpoint,
    pub(super) options: QuicOptions,
    transport: Arc<TransportConfig>,
    /// What calls are made with.
    client: RwLock<quinn::ClientConfig>,
    pub(super) links: mpsc::Sender<ControlLink>,
    /// Places for callers who have not shown who they are.
    pub(super) strangers: Arc<Semaphore>,
    /// Places for workers that wait for an epoch to begin here.
    pub(super) callers: Semaphore,
    /// Expert workers of this process that expect connections, by index.
    joined: Mutex<HashMap<u16, Joined>>,
    /// Counts changes of `joined`.
    pub(super) changes: watch::Sender<u64>,
    /// Everybody who serves a peer's lanes has one more of these.
    serving: Arc<()>,
}

/// An expert worker that expects connections.
pub(super) struct Joined {
    pub(super) carrier: Carrier,
    pub(super) epoch: Epoch,
    pub(super) topology: Topology,
    /// By attention worker; none when the worker has left the epoch.
    pub(super) takers: Vec<mpsc::Sender<Arrived>>,
}

/// How a node was reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reached {
    /// Who it is.
    pub peer: Peer,
    /// How long it took to prove to each other who we are.
    pub handshake: Duration,
    /// There and back.
    pub round_trip: Duration,
    /// Largest UDP payload that gets there, in bytes.
    pub datagram: u16,
}

impl std::fmt::Debug for QuicNode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QuicNode({})", self.0.address)
    }
}

impl std::fmt::Debug for WeakQuicNode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WeakQuicNode")
    }
}

impl QuicNode {
    /// Listens on a UDP address; port 0 lets the system choose.
    ///
    /// # Errors
    /// The address cannot be had, threads cannot be started, or an option is out of range.
    pub fn bind(
        listen: SocketAddr,
        identity: &Identity,
        options: QuicOptions,
    ) -> Result<Self, QuicError> {
        if options.connections == 0 || options.threads == 0 {
            return Err(QuicError::Option(
                "a node needs at least one connection for each pair, and one thread".to_owned(),
            ));
        }
        let bind = |error| QuicError::Bind {
            address: listen,
            error,
        };
        let transport = setup::transport(&options)?;
        let client = setup::client(identity, &transport)?;
        let server = setup::server(identity, &transport)?;

        let socket = setup::socket(listen).map_err(bind)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(options.threads)
            .thread_name("network")
            .enable_all()
            .build()
            .map_err(QuicError::Threads)?;
        let endpoint = {
            let _context = runtime.enter();
            let config = setup::endpoint()?;
            Endpoint::new(config, Some(server), socket, Arc::new(quinn::TokioRuntime))
        };
        let endpoint = endpoint.map_err(bind)?;
        let address = endpoint.local_addr().map_err(bind)?;
        let (links, accepted) = mpsc::channel(LINKS_WAITING_MAX);
        let shared = Arc::new(Shared {
            endpoint,
            options,
            transport,
            client: RwLock::new(client),
            links,
            strangers: Arc::new(Semaphore::new(STRANGERS_MAX)),
            callers: Semaphore::new(CALLERS_MAX),
            joined: Mutex::new(HashMap::new()),
            changes: watch::Sender::new(0),
            serving: Arc::new(()),
        });
        runtime.spawn(Arc::clone(&shared).listen());
        Ok(Self(Arc::new(Inner {
            shared,
            address,
            links: AsyncMutex::new(accepted),
            runtime: Some(runtime),
        })))
    }

    /// For who looks after the node without keeping it.
    pub fn downgrade(&self) -> WeakQuicNode {
        WeakQuicNode(Arc::downgrade(&self.0))
    }

    /// Proves itself with `identity` from now on, and trusts whom it trusts: for certificates that are renewed, and lists of revocations that grow. Connections there
    /// are go on.
    ///
    /// # Errors
    /// It is of no use.
    pub fn renew(&self, identity: &Identity) -> Result<(), QuicError> {
        let shared = &self.0.shared;
        let server = setup::server(identity, &shared.transport)?;
        let client = setup::client(identity, &shared.transport)?;
        shared.endpoint.set_server_config(Some(server));
        *shared
            .client
            .write()
            .unwrap_or_else(PoisonError::into_inner) = client;
        Ok(())
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.0.address
    }

    /// Calls another node and opens a control link to it, which must be an `expect`.
    ///
    /// # Errors
    /// It is not reached in time, does not prove who it is, or refuses.
    pub async fn call(
        &self,
        address: SocketAddr,
        expect: NodeRole,
    ) -> Result<ControlLink, QuicError> {
        let shared = Arc::clone(&self.0.shared);
        let limit = shared.options.connect;
        let called = async move {
            let call = shared.call(address, expect, Hello::Control);
            timeout(limit, call).await
        };
        let called = self.spawn(called).await;
        let late = || QuicError::Connect {
            address,
            expected: expect,
            reason: format!("no answer within {limit:?}"),
        };
        let (connection, send, receive) = called.map_err(|_| late())?.map_err(|_| late())??;
        Window::control().open(&connection);
        let peer = peer(&connection).map_err(|reason| QuicError::Connect {
            address,
            expected: expect,
            reason,
        })?;
        Ok(ControlLink::new(peer, connection, send, receive))
    }

    /// Tries the way to another node, which must be an `expect`: whether it proves who it is, how far it is, and how large datagrams may be. Takes up to three seconds
    /// beyond the time to reach it.
    ///
    /// # Errors
    /// It is not reached in time, does not prove who it is, or refuses.
    pub async fn probe(&self, address: SocketAddr, expect: NodeRole) -> Result<Reached, QuicError> {
        let shared = Arc::clone(&self.0.shared);
        let limit = shared.options.connect;
        let start = Instant::now();
        let probed = async move {
            let call = shared.call(address, expect, Hello::Probe);
            let late = |_| QuicError::Connect {
                address,
                expected: expect,
                reason: format!("no answer within {limit:?}"),
            };
            let (connection, ..) = timeout(limit, call).await.map_err(late)??;
            let handshake = start.elapsed();
            let peer = peer(&connection).map_err(|reason| QuicError::Connect {
                address,
                expected: expect,
                reason,
            })?;
            let until = Instant::now() + MTU_SEARCH;
            let (mut datagram, mut grown) = (0, Instant::now());
            while Instant::now() < until && grown.elapsed() < MTU_SETTLED {
                let now = connection.stats().path.current_mtu;
                if now > datagram {
                    (datagram, grown) = (now, Instant::now());
                }
                sleep(Duration::from_millis(20)).await;
            }
            let round_trip = connection.rtt();
            connection.close(VarInt::from_u32(0), b"probed");
            Ok(Reached {
                peer,
                handshake,
                round_trip,
                datagram,
            })
        };
        let ended = |_| QuicError::Lost {
            address,
            reason: "the node ends".to_owned(),
        };
        self.spawn(probed).await.map_err(ended)?
    }

    /// The next control link that somebody opened to this node. Never none while the node lives.
    pub async fn accept(&self) -> Option<ControlLink> {
        self.0.links.lock().await.recv().await
    }

    /// This worker's end of the lanes of one epoch. Returns at once: connections are made meanwhile, frames that are posted wait for them, and a peer that cannot be
    /// reached is reported lost.
    ///
    /// Attention workers call: `experts` has the address of each expert worker by index, none for those that take no part. Expert workers are called, and need none.
    ///
    /// # Errors
    /// The topology is empty or too large, or does not have this worker.
    pub fn join(
        &self,
        epoch: Epoch,
        me: WorkerId,
        topology: &Topology,
        experts: &[Option<SocketAddr>],
    ) -> Result<QuicEndpoint, QuicError> {
        check(me, topology)?;
        let shared = &self.0.shared;
        match me.role {
            Role::Attention => {
                let node = self.clone();
                // A node lives as long as its endpoints.
                let leave = Leave(Some(Box::new(move || drop(node))));
                let (endpoint, sides) = fabric::build(me, topology, Spin::NONE, leave);
                for side in sides {
                    let Some(address) = experts.get(usize::from(side.peer)).copied().flatten()
                    else {
                        side.absent();
                        continue;
                    };
                    let shared = Arc::clone(shared);
                    let serving = Arc::clone(&shared.serving);
                    self.spawn(async move {
                        shared.serve_as_caller(side, epoch, address).await;
                        drop(serving);
                    });
                }
                Ok(endpoint)
            }
            Role::Expert => {
                let (calls, leave) = self.expect(Carrier::Streams, epoch, me, topology);
                let (endpoint, sides) = fabric::build(me, topology, Spin::NONE, leave);
                for (side, calls) in sides.into_iter().zip(calls) {
                    let connect = shared.options.connect;
                    let serving = Arc::clone(&shared.serving);
                    self.spawn(async move {
                        serve_as_called(side, calls, connect).await;
                        drop(serving);
                    });
                }
                Ok(endpoint)
            }
        }
    }

    /// Expects data connections of the attention workers, each to be taken from the receiver at its index, until the guard is dropped.
    pub(crate) fn expect(
        &self,
        carrier: Carrier,
        epoch: Epoch,
        me: WorkerId,
        topology: &Topology,
    ) -> (Vec<Calls>, Leave) {
        let shared = &self.0.shared;
        let (takers, calls) = (0..topology.attention)
            .map(|_| mpsc::channel(LANES_MAX as usize))
            .unzip();
        let joined = Joined {
            carrier,
            epoch,
            topology: *topology,
            takers,
        };
        shared.joined().insert(me.index, joined);
        shared.changes.send_modify(|count| *count += 1);
        let node = self.clone();
        let leave = Leave(Some(Box::new(move || {
            let mut joined = node.0.shared.joined();
            if let Some(joined) = joined.get_mut(&me.index).filter(|j| j.epoch == epoch) {
                joined.takers.clear();
            }
        })));
        (calls, leave)
    }

    /// Calls an expert worker for one data connection, again and again until the time is up or the caller is `abandoned`.
    pub(crate) async fn dial(
        &self,
        data: DataHello,
        address: SocketAddr,
        abandoned: impl Fn() -> bool,
    ) -> Result<Connection, LostReason> {
        let shared = &self.0.shared;
        let until = Instant::now() + shared.options.connect;
        shared.dial(data, address, until, abandoned).await
    }

    /// How long a peer may take to be reached.
    pub(crate) fn connect_limit(&self) -> Duration {
        self.0.shared.options.connect
    }

    /// The node's end waits a little for those who hold one.
    pub(crate) fn serving(&self) -> Arc<()> {
        Arc::clone(&self.0.shared.serving)
    }

    pub(crate) fn spawn<F>(&self, task: F) -> tokio::task::JoinHandle<F::Output>
    where
        F: Future<Output: Send + 'static> + Send + 'static,
    {
        let runtime = self.0.runtime.as_ref();
        runtime
            .expect("the runtime lives as long as the node")
            .spawn(task)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let Some(runtime) = self.runtime.take() else {
            return;
        };
        let shared = Arc::clone(&self.shared);
        // Frames that were posted last have to be read, and last words have to leave the socket. Not waited for here: this may be a thread of an async runtime.
        let end = move || {
            runtime.block_on(async {
                let until = Instant::now() + fabric::LINGER;
                while Arc::strong_count(&shared.serving) > 1 && Instant::now() < until {
                    sleep(Duration::from_millis(2)).await;
                }
                shared
                    .endpoint
                    .close(VarInt::from_u32(0), b"the process ends");
                let _ = timeout_at(until, shared.endpoint.wait_idle()).await;
            });
            runtime.shutdown_background();
        };
        let ending = std::thread::Builder::new()
            .name("network-end".into())
            .spawn(end);
        if let Err(error) = ending {
            tracing::error!("no thread to end the network with: {error}");
        }
    }
}

impl Shared {
    pub(super) fn joined(&self) -> MutexGuard<'_, HashMap<u16, Joined>> {
        self.joined.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn client(&self) -> quinn::ClientConfig {
        let client = self.client.read().unwrap_or_else(PoisonError::into_inner);
        client.clone()
    }

    /// Connects, says hello, and reads the answer.
    async fn call(
        &self,
        address: SocketAddr,
        expect: NodeRole,
        hello: Hello,
    ) -> Result<(Connection, quinn::SendStream, quinn::RecvStream), QuicError> {
        let failed = |reason: String| QuicError::Connect {
            address,
            expected: expect,
            reason,
        };
        let client = self.client();
        let connection = self
            .endpoint
            .connect_with(client, address, expect.server_name())
            .map_err(|error| failed(error.to_string()))?
            .await
            .map_err(|error| failed(error.to_string()))?;
        let lost = |error: &dyn std::fmt::Display| failed(error.to_string());
        let (mut send, mut receive) = connection.open_bi().await.map_err(|e| lost(&e))?;
        send.write_all(&hello.encode())
            .await
            .map_err(|e| lost(&e))?;
        let asked = match hello {
            Hello::Data(data) => Some(Role::Expert.worker(data.expert)),
            Hello::Control | Hello::Probe => None,
        };
        let seat = peer(&connection).map_err(failed)?.seat;
        if let (Some(asked), Some(seat)) = (asked, seat)
            && asked != seat
        {
            return Err(failed(format!(
                "its certificate is {seat}'s, and {asked} was to be there"
            )));
        }
        let mut answer = [REFUSED];
        receive
            .read_exact(&mut answer)
            .await
            .map_err(|e| lost(&e))?;
        match answer[0] {
            TAKEN => return Ok((connection, send, receive)),
            LEFT => return Err(QuicError::Left { address }),
            _ => {}
        }
        let rest = receive
            .read_to_end(2 + REASON_MAX)
            .await
            .unwrap_or_default();
        let reason = rest
            .get(2..)
            .map(String::from_utf8_lossy)
            .unwrap_or_default();
        Err(QuicError::Refused {
            address,
            reason: reason.into_owned(),
        })
    }

    /// Calls an expert worker until it is reached or the time is up.
    async fn dial(
        &self,
        data: DataHello,
        address: SocketAddr,
        until: Instant,
        abandoned: impl Fn() -> bool,
    ) -> Result<Connection, LostReason> {
        loop {
            let call = self.call(address, NodeRole::Worker, Hello::Data(data));
            let reason = match timeout_at(until, call).await {
                Ok(Ok((connection, ..))) => {
                    Window::lanes(&data).open(&connection);
                    return Ok(connection);
                }
                Ok(Err(QuicError::Left { .. })) => return Err(LostReason::Closed),
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("expert-{} at {address} did not answer", data.expert),
            };
            if abandoned() || Instant::now() + REDIAL >= until {
                if !abandoned() {
                    tracing::warn!(
                        "attention-{}: no lanes of {}: {reason}",
                        data.attention,
                        data.epoch
                    );
                }
                return Err(LostReason::Unreachable);
            }
            sleep(REDIAL).await;
        }
    }

    /// Calls an expert worker until it is reached or the time is up, and serves its lanes.
    async fn serve_as_caller(self: Arc<Self>, side: PeerSide, epoch: Epoch, address: SocketAddr) {
        let connections = self.options.connections.min(side.topology.micro_batches);
        let until = Instant::now() + self.options.connect;
        let mut open = Vec::new();
        for connection in 0..connections {
            let data = DataHello {
                carrier: Carrier::Streams,
                epoch,
                attention: side.me.index,
                expert: side.peer,
                connection,
                connections,
                topology: side.topology,
            };
            match self
                .dial(data, address, until, || side.is_abandoned())
                .await
            {
                Ok(connection) => open.push((connection, data.micro_batches().collect())),
                Err(reason) => return side.lose(reason),
            }
        }
        side.serve(open).await;
    }
}

/// Data connections of one attention worker as they come.
pub(crate) type Calls = mpsc::Receiver<Arrived>;

/// Whether `me` is one of the topology's, and the topology one that this protocol can carry.
pub(crate) fn check(me: WorkerId, topology: &Topology) -> Result<(), QuicError> {
    topology.bytes()?;
    let slot = topology.dispatch_bytes.max(topology.combine_bytes);
    if u32::try_from(slot).is_err() || u32::from(topology.micro_batches) > LANES_MAX {
        return Err(QuicError::Option(format!(
            "slots of {slot} bytes and {} micro-batches: QUIC takes slots of 4 GiB less one byte, and {LANES_MAX} micro-batches",
            topology.micro_batches
        )));
    }
    if me.index >= topology.workers(me.role) {
        return Err(QuicError::Option(format!(
            "{me} is not one of {} {} workers",
            topology.workers(me.role),
            me.role
        )));
    }
    Ok(())
}

/// Who is at the other end, by its certificate.
pub(super) fn peer(connection: &Connection) -> Result<Peer, String> {
    let chain = connection.peer_identity().and_then(|identity| {
        identity
            .downcast::<Vec<rustls::pki_types::CertificateDer<'static>>>()
            .ok()
    });
    let certificate = chain.as_ref().and_then(|chain| chain.first());
    let certificate = certificate.ok_or("it has no certificate")?;
    let who = identity::read(certificate)?;
    Ok(Peer {
        role: who.role,
        seat: who.seat,
        name: who.name,
        address: connection.remote_address(),
    })
}
