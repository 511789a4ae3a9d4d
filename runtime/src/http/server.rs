//! Accepting connections, bounded in number, headers and time, until it is time to stop.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use metrics::gauge;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::metrics::CONNECTIONS;

/// Connections at once; more wait to be accepted.
const CONNECTIONS_MAX: usize = 4096;
/// A request's headers have to arrive within this time; so long a connection may also rest between requests.
const HEADER_DEADLINE: Duration = Duration::from_secs(10);
/// Bytes of a request's headers, and of what is read ahead.
const BUFFER_BYTES_MAX: usize = 64 << 10;
/// Rest after an error of accepting, most likely that there are no more file descriptors.
const ACCEPT_REST: Duration = Duration::from_millis(100);

/// Serves `router` until `shutdown`; then takes no new connections and waits for the answers under way.
pub(super) async fn run(listener: TcpListener, router: Router, shutdown: impl Future<Output = ()>) {
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let graceful = GracefulShutdown::new();
    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            accepted = accept(&listener, &permits) => match accepted {
                Ok((stream, permit)) => serve(stream, permit, router.clone(), &graceful),
                Err(error) => {
                    tracing::warn!("A connection could not be accepted: {error}. The server tries again");
                    tokio::time::sleep(ACCEPT_REST).await;
                }
            },
        }
    }
    drop(listener);
    graceful.shutdown().await;
}

async fn accept(
    listener: &TcpListener,
    permits: &Arc<Semaphore>,
) -> io::Result<(TcpStream, OwnedSemaphorePermit)> {
    let permit = Arc::clone(permits)
        .acquire_owned()
        .await
        .map_err(io::Error::other)?;
    let (stream, _) = listener.accept().await?;
    // A token must not wait for the next one to fill a packet.
    stream.set_nodelay(true)?;
    Ok((stream, permit))
}

fn serve(
    stream: TcpStream,
    permit: OwnedSemaphorePermit,
    router: Router,
    graceful: &GracefulShutdown,
) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_DEADLINE)
        .max_buf_size(BUFFER_BYTES_MAX)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let connection = graceful.watch(connection);
    tokio::spawn(async move {
        let _permit = permit;
        gauge!(CONNECTIONS).increment(1.0);
        if let Err(error) = connection.await {
            tracing::debug!("A connection ended early: {error}");
        }
        gauge!(CONNECTIONS).decrement(1.0);
    });
}
