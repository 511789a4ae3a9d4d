//! Accepting connections, bounded in number, memory and time, until it is time to stop.
//!
//! What a client can hold, and for how long: a place (`Places`) while no newcomer needs it or a request of it is answered; a buffer of
//! [`Limits::head_bytes`] in each direction; [`Limits::head_timeout`] for a request's head, which is also how long a connection may rest; and
//! [`Limits::stall_timeout`] without taking anything of what is sent to it, or without any sign of life.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use metrics::{counter, gauge};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::holding::Holding;
use super::metrics::{CONNECTIONS, SHED};
use super::places::{Place, Places};

/// What clients may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once.
    pub connections: usize,
    /// Bytes of a request's head, and of what is buffered in each direction; at least [`HEAD_BYTES_MIN`].
    pub head_bytes: usize,
    /// A request's head has to arrive within this time; so long a connection may also rest between requests.
    pub head_timeout: Duration,
    /// A client that takes nothing of what is sent to it for so long is gone, as is one whose machine gives no sign of life.
    pub stall_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connections: 4096,
            head_bytes: 32 << 10,
            head_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(60),
        }
    }
}

/// Least buffer that a connection works with.
pub const HEAD_BYTES_MIN: usize = 8 << 10;
/// Headers of a request; more are answered with 431.
const HEADERS_MAX: usize = 100;
/// Rest after an error of accepting, most likely that there are no more file descriptors.
const ACCEPT_REST: Duration = Duration::from_millis(100);
/// Time for the last bytes of a connection that has to go.
const LAST_BYTES: Duration = Duration::from_secs(1);
/// Refusals under way at once; who comes beside them is cut off without a word.
const REFUSALS_MAX: usize = 64;
/// The log speaks of shed connections so often at most.
const SHED_LOG_EVERY: Duration = Duration::from_secs(10);

/// Serves `router` until `shutdown`; then takes no new connections and waits for the answers under way.
pub async fn run(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    shutdown: impl Future<Output = ()>,
) {
    let places = Places::new(limits.connections);
    let refusals = Arc::new(Semaphore::new(REFUSALS_MAX));
    let mut shed = Shed::default();
    let (stop, stopped) = watch::channel(());
    let mut connections = JoinSet::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    prepare(&stream, &limits);
                    let Some((place, gave_up)) = places.enter() else {
                        shed.count(Why::Busy, limits.connections);
                        begin_refusal(stream, &refusals);
                        continue;
                    };
                    if gave_up {
                        shed.count(Why::Rested, limits.connections);
                    }
                    connections.spawn(serve(stream, place, router.clone(), limits, stopped.clone()));
                }
                Err(error) => {
                    tracing::warn!("A connection could not be accepted: {error}. The server tries again");
                    tokio::time::sleep(ACCEPT_REST).await;
                }
            },
        }
    }
    drop(listener);
    drop(stop);
    while connections.join_next().await.is_some() {}
}

/// Options of a socket. Whatever cannot be set, the connection works without.
fn prepare(stream: &TcpStream, limits: &Limits) {
    // A token must not wait for the next one to fill a packet.
    let _ = stream.set_nodelay(true);
    let socket = SockRef::from(stream);
    let _ = socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(limits.stall_timeout));
    // Counts data that is not acknowledged as well as data that is not taken.
    let _ = socket.set_tcp_user_timeout(Some(limits.stall_timeout));
}

/// Serves a connection until it ends, its place is needed, or the server stops.
async fn serve(
    stream: TcpStream,
    place: Arc<Place>,
    router: Router,
    limits: Limits,
    mut stopped: watch::Receiver<()>,
) {
    let _open = Open::new();
    let service = TowerToHyperService::new(router);
    let held = Arc::clone(&place);
    let service = service_fn(move |request: Request<Incoming>| {
        let busy = held.busy();
        let answer = service.call(request);
        async move {
            let answer = answer.await?;
            Ok::<_, std::convert::Infallible>(answer.map(|body: Body| Holding::wrap(body, busy)))
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head_timeout)
        .max_headers(HEADERS_MAX)
        .max_buf_size(limits.head_bytes.max(HEAD_BYTES_MIN))
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let deadline = tokio::select! {
        ended = connection.as_mut() => {
            if let Err(error) = ended {
                tracing::debug!("A connection ended early: {error}");
            }
            return;
        }
        () = place.wanted() => Some(LAST_BYTES),
        // The other end is dropped, nothing is ever sent.
        _ = stopped.changed() => None,
    };
    if place.is_fresh() {
        return;
    }
    // Ends at once if it rests and everything is written, else behind the answer.
    connection.as_mut().graceful_shutdown();
    match deadline.filter(|_| !place.is_busy()) {
        Some(deadline) => drop(timeout(deadline, connection).await),
        None => drop(connection.await),
    }
}

/// Tells a client that there is no place, unless too many are being told already.
fn begin_refusal(stream: TcpStream, refusals: &Arc<Semaphore>) {
    if let Ok(permit) = Arc::clone(refusals).try_acquire_owned() {
        tokio::spawn(async move {
            let _permit = permit;
            let _ = timeout(LAST_BYTES, refuse(stream)).await;
        });
    }
}

async fn refuse(mut stream: TcpStream) -> io::Result<()> {
    const BODY: &str = r#"{"error":{"message":"every connection of this server is busy (`server.max_connections`); come back later, or use connections for more than one request at a time","type":"server_error","param":null,"code":"overloaded"}}"#;
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{BODY}",
        BODY.len()
    );
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await?;
    // What is closed with unread bytes is reset, and the client would not see the answer.
    let mut rest = [0; 1024];
    while stream.read(&mut rest).await? > 0 {}
    Ok(())
}

/// Counts a connection while it is open.
struct Open(metrics::Gauge);

impl Open {
    fn new() -> Self {
        let gauge = gauge!(CONNECTIONS);
        gauge.increment(1.0);
        Open(gauge)
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

/// Why a connection had to go.
#[derive(Clone, Copy)]
enum Why {
    Rested,
    Busy,
}

/// Counts connections that had to go, and says so in the log now and then.
#[derive(Default)]
struct Shed {
    rested: u64,
    refused: u64,
    said: Option<Instant>,
}

impl Shed {
    fn count(&mut self, why: Why, places: usize) {
        let (count, label) = match why {
            Why::Rested => (&mut self.rested, "resting"),
            Why::Busy => (&mut self.refused, "refused"),
        };
        *count += 1;
        counter!(SHED, "kind" => label).increment(1);
        if self
            .said
            .is_none_or(|said| said.elapsed() >= SHED_LOG_EVERY)
        {
            tracing::warn!(
                "all {places} places for connections are taken (server.max_connections): since the last word of this, {} resting connections were closed for new ones and {} new ones were refused with 503",
                self.rested,
                self.refused
            );
            *self = Shed {
                said: Some(Instant::now()),
                ..Shed::default()
            };
        }
    }
}
