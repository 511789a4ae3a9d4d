//! One process's place in the network: a socket, who it is, and what it expects.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use quinn::congestion::BbrConfig;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{
    Connection, Endpoint, IdleTimeout, Incoming, MtuDiscoveryConfig, TransportConfig, VarInt,
};
use tokio::runtime::Runtime;
use tokio::sync::{Mutex as AsyncMutex, Semaphore, mpsc, watch};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::control::{ControlLink, Peer};
use super::fabric::{self, Leave, PeerSide, QuicEndpoint};
use super::hello::{
    Carrier, DataHello, HELLO_BYTES, Hello, LEFT, REASON_MAX, REFUSED, TAKEN, refusal,
};
use super::identity::{self, Identity, NodeRole};
use super::{IdentityError, QuicError};
use crate::ball::Spin;
use crate::{Epoch, LostReason, Role, Topology, WorkerId};

/// Handshakes and hellos of strangers under way at once; more are turned away.
const STRANGERS_MAX: usize = 256;
/// Lanes of a connection.
const LANES_MAX: u32 = 64;
/// Control links that wait to be accepted; more are turned away.
const LINKS_WAITING_MAX: usize = 64;
/// Pause before a peer that could not be reached is called again.
const REDIAL: Duration = Duration::from_millis(50);
/// Data in flight on a connection.
const WINDOW: u32 = 64 << 20;
/// What a connection may send before it knows the path: a few slots of small models.
const INITIAL_WINDOW: u64 = 256 << 10;
/// Largest datagram that is tried: an Ethernet jumbo frame less the IPv6 and UDP headers. Found out for each path; each packet costs about the same, so large ones pay.
const PAYLOAD_MAX: u16 = 8952;
/// Memory the system is asked for, for datagrams that have come. It gives what its own limit allows.
const SOCKET_BUFFER: usize = 8 << 20;

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

struct Inner {
    shared: Arc<Shared>,
    address: SocketAddr,
    links: AsyncMutex<mpsc::Receiver<ControlLink>>,
    runtime: Option<Runtime>,
}

/// What the node's tasks share.
struct Shared {
    endpoint: Endpoint,
    options: QuicOptions,
    links: mpsc::Sender<ControlLink>,
    strangers: Semaphore,
    /// Expert workers of this process that expect connections, by index.
    joined: Mutex<HashMap<u16, Joined>>,
    /// Counts changes of `joined`.
    changes: watch::Sender<u64>,
    /// Everybody who serves a peer's lanes has one more of these.
    serving: Arc<()>,
}

/// An expert worker that expects connections.
struct Joined {
    carrier: Carrier,
    epoch: Epoch,
    topology: Topology,
    /// By attention worker; none when the worker has left the epoch.
    takers: Vec<mpsc::UnboundedSender<(Connection, DataHello)>>,
}

impl std::fmt::Debug for QuicNode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "QuicNode({})", self.0.address)
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
        let transport = transport(&options)?;
        let unusable = |error: &dyn std::fmt::Display| {
            QuicError::Identity(IdentityError::Content {
                what: "certificate and key".to_owned(),
                reason: error.to_string(),
            })
        };
        let server = QuicServerConfig::try_from(identity.server()).map_err(|e| unusable(&e))?;
        let client = QuicClientConfig::try_from(identity.client()).map_err(|e| unusable(&e))?;
        let mut server = quinn::ServerConfig::with_crypto(Arc::new(server));
        server.transport_config(Arc::clone(&transport));
        let mut client = quinn::ClientConfig::new(Arc::new(client));
        client.transport_config(transport);

        let socket = socket(listen).map_err(bind)?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(options.threads)
            .thread_name("network")
            .enable_all()
            .build()
            .map_err(QuicError::Threads)?;
        let mut config = quinn::EndpointConfig::default();
        config
            .max_udp_payload_size(PAYLOAD_MAX)
            .map_err(|error| QuicError::Option(error.to_string()))?;
        let endpoint = {
            let _context = runtime.enter();
            Endpoint::new(config, Some(server), socket, Arc::new(quinn::TokioRuntime))
        };
        let mut endpoint = endpoint.map_err(bind)?;
        endpoint.set_default_client_config(client);
        let address = endpoint.local_addr().map_err(bind)?;
        let (links, accepted) = mpsc::channel(LINKS_WAITING_MAX);
        let shared = Arc::new(Shared {
            endpoint,
            options,
            links,
            strangers: Semaphore::new(STRANGERS_MAX),
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
        let peer = peer(&connection).map_err(|reason| QuicError::Connect {
            address,
            expected: expect,
            reason,
        })?;
        Ok(ControlLink::new(peer, connection, send, receive))
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
            .map(|_| mpsc::unbounded_channel())
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
    fn joined(&self) -> MutexGuard<'_, HashMap<u16, Joined>> {
        self.joined.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes calls until the node ends.
    async fn listen(self: Arc<Self>) {
        while let Some(incoming) = self.endpoint.accept().await {
            let places = self.strangers.available_permits();
            if places == 0 {
                incoming.refuse();
                continue;
            }
            // When they get few, whoever calls has to show first that it is where it says: an address can be made up, a way back cannot.
            if places < STRANGERS_MAX / 2 && !incoming.remote_address_validated() {
                let _ = incoming.retry();
                continue;
            }
            let shared = Arc::clone(&self);
            tokio::spawn(async move {
                let Ok(_permit) = shared.strangers.try_acquire() else {
                    incoming.refuse();
                    return;
                };
                let from = incoming.remote_address();
                let limit = shared.options.connect;
                match timeout(limit, shared.welcome(incoming)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(reason)) => tracing::warn!("a call from {from} was refused: {reason}"),
                    Err(_) => tracing::warn!("a call from {from} said nothing within {limit:?}"),
                }
            });
        }
    }

    /// Handshake, hello, and what the caller wants.
    async fn welcome(&self, incoming: Incoming) -> Result<(), String> {
        let connection = incoming.await.map_err(|error| error.to_string())?;
        let peer = peer(&connection)?;
        let (mut send, mut receive) = connection.accept_bi().await.map_err(|e| e.to_string())?;
        let mut bytes = [0; HELLO_BYTES];
        receive
            .read_exact(&mut bytes)
            .await
            .map_err(|e| e.to_string())?;
        let refused = match Hello::decode(&bytes) {
            Ok(Hello::Control) => match self.links.try_reserve() {
                Ok(place) => {
                    send.write_all(&[TAKEN]).await.map_err(|e| e.to_string())?;
                    place.send(ControlLink::new(peer, connection, send, receive));
                    return Ok(());
                }
                Err(_) => "too many links wait to be taken".to_owned(),
            },
            Ok(Hello::Data(data)) => match self.take(peer.role, &data).await {
                Ok(taker) => {
                    send.write_all(&[TAKEN]).await.map_err(|e| e.to_string())?;
                    // Dropped without a word if the worker has left meanwhile; the caller sees the connection close.
                    let _ = taker.send((connection, data));
                    return Ok(());
                }
                Err(None) => {
                    let _ = send.write_all(&[LEFT]).await;
                    let _ = send.finish();
                    let _ = timeout(Duration::from_secs(1), send.stopped()).await;
                    return Ok(());
                }
                Err(Some(reason)) => reason,
            },
            Err(reason) => reason,
        };
        let _ = send.write_all(&refusal(&refused)).await;
        let _ = send.finish();
        let _ = timeout(Duration::from_secs(1), send.stopped()).await;
        connection.close(VarInt::from_u32(1), refused.as_bytes());
        Err(format!("{} {}: {refused}", peer.role, peer.name))
    }

    /// Who takes a data connection. Waits for a worker that is about to join the epoch. The error is the reason of a refusal; none if the worker has left the epoch.
    async fn take(
        &self,
        role: NodeRole,
        data: &DataHello,
    ) -> Result<mpsc::UnboundedSender<(Connection, DataHello)>, Option<String>> {
        let refuse = |reason: String| Err(Some(reason));
        if role != NodeRole::Worker {
            return refuse("only workers exchange rows".to_owned());
        }
        let mut changes = self.changes.subscribe();
        loop {
            if let Some(joined) = self.joined().get(&data.expert) {
                let (ours, theirs) = (joined.epoch, data.epoch);
                if theirs < ours {
                    let expert = data.expert;
                    return refuse(format!("{theirs} is over; expert-{expert} is in {ours}"));
                }
                if theirs == ours {
                    let disagreement = data.disagreement(&joined.topology);
                    if joined.carrier != data.carrier {
                        let (ours, theirs) = (joined.carrier, data.carrier);
                        return refuse(format!("rows travel by {ours} there, by {theirs} here"));
                    }
                    if !disagreement.is_empty() {
                        return refuse(format!("we disagree: {disagreement}"));
                    }
                    let taker = joined.takers.get(usize::from(data.attention));
                    return taker.cloned().ok_or(None);
                }
            }
            // The whole call has a deadline.
            if changes.changed().await.is_err() {
                return refuse("the node ends".to_owned());
            }
        }
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
        let connection = self
            .endpoint
            .connect(address, expect.server_name())
            .map_err(|error| failed(error.to_string()))?
            .await
            .map_err(|error| failed(error.to_string()))?;
        let lost = |error: &dyn std::fmt::Display| failed(error.to_string());
        let (mut send, mut receive) = connection.open_bi().await.map_err(|e| lost(&e))?;
        send.write_all(&hello.encode())
            .await
            .map_err(|e| lost(&e))?;
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
                Ok(Ok((connection, ..))) => return Ok(connection),
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
pub(crate) type Calls = mpsc::UnboundedReceiver<(Connection, DataHello)>;

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

/// Waits for an attention worker's connections, and serves its lanes.
async fn serve_as_called(side: PeerSide, mut calls: Calls, limit: Duration) {
    let until = Instant::now() + limit;
    let mut open: Vec<(Connection, Vec<u8>)> = Vec::new();
    let mut expected = 1;
    let mut seen = Vec::new();
    while seen.len() < expected {
        match timeout_at(until, calls.recv()).await {
            Ok(Some((connection, data))) => {
                if seen.contains(&data.connection) {
                    connection.close(VarInt::from_u32(1), b"the same connection twice");
                    continue;
                }
                expected = usize::from(data.connections);
                seen.push(data.connection);
                open.push((connection, data.micro_batches().collect()));
            }
            // Nobody calls any more: the worker has left, or the peer is not there.
            Ok(None) => return,
            Err(_) => return side.lose(LostReason::Unreachable),
        }
    }
    side.serve(open).await;
}

/// Who is at the other end, by its certificate.
fn peer(connection: &Connection) -> Result<Peer, String> {
    let chain = connection.peer_identity().and_then(|identity| {
        identity
            .downcast::<Vec<rustls::pki_types::CertificateDer<'static>>>()
            .ok()
    });
    let certificate = chain.as_ref().and_then(|chain| chain.first());
    let certificate = certificate.ok_or("it has no certificate")?;
    let (role, name) = identity::read(certificate)?;
    Ok(Peer {
        role,
        name,
        address: connection.remote_address(),
    })
}

fn transport(options: &QuicOptions) -> Result<Arc<TransportConfig>, QuicError> {
    let idle = IdleTimeout::try_from(options.idle).map_err(|_| {
        QuicError::Option(format!(
            "an idle time of {:?} cannot be written",
            options.idle
        ))
    })?;
    let mut transport = TransportConfig::default();
    let mut congestion = BbrConfig::default();
    congestion.initial_window(INITIAL_WINDOW);
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(PAYLOAD_MAX);
    transport
        .mtu_discovery_config(Some(mtu))
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(options.keep_alive))
        // The hello's, and one for each lane.
        .max_concurrent_bidi_streams(VarInt::from_u32(LANES_MAX + 1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(WINDOW))
        .receive_window(VarInt::from_u32(WINDOW))
        .send_window(u64::from(WINDOW))
        .datagram_receive_buffer_size(None)
        .initial_rtt(Duration::from_millis(20))
        .congestion_controller_factory(Arc::new(congestion));
    Ok(Arc::new(transport))
}

fn socket(listen: SocketAddr) -> std::io::Result<std::net::UdpSocket> {
    use socket2::{Domain, Protocol, Socket, Type};
    let socket = Socket::new(
        Domain::for_address(listen),
        Type::DGRAM,
        Some(Protocol::UDP),
    )?;
    // What the system does not give costs speed, not correctness.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    socket.bind(&listen.into())?;
    Ok(socket.into())
}
