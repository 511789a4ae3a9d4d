//! Links for messages of any kind between two processes: length-prefixed, in order, over one stream.

use std::net::SocketAddr;

use quinn::{Connection, ConnectionError, ReadError, RecvStream, SendStream, VarInt};

use super::{NodeRole, QuicError};
use crate::WorkerId;

/// Longest control message, in bytes.
pub const CONTROL_MESSAGE_MAX: usize = 64 << 20;
/// What a message's buffer grows by: memory follows what has come, not what was announced.
const GROWTH: usize = 64 << 10;

/// Who is at the other end of a link, as its certificate says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// What it may do.
    pub role: NodeRole,
    /// The one worker it may be; any if none.
    pub seat: Option<WorkerId>,
    /// The name in its certificate.
    pub name: String,
    /// Where it is: the address of its node.
    pub address: SocketAddr,
}

/// An authenticated link. Both halves may be used from any thread and any runtime.
#[derive(Debug)]
pub struct ControlLink {
    peer: Peer,
    sender: ControlSender,
    receiver: ControlReceiver,
}

/// The sending half.
#[derive(Debug)]
pub struct ControlSender {
    connection: Connection,
    stream: SendStream,
}

/// The receiving half. It keeps what has come of a message, so a `recv` that is given up loses nothing.
#[derive(Debug)]
pub struct ControlReceiver {
    connection: Connection,
    stream: RecvStream,
    head: [u8; 4],
    head_len: usize,
    body: Vec<u8>,
    body_len: usize,
}

impl ControlLink {
    pub(super) fn new(
        peer: Peer,
        connection: Connection,
        send: SendStream,
        receive: RecvStream,
    ) -> Self {
        Self {
            peer,
            sender: ControlSender {
                connection: connection.clone(),
                stream: send,
            },
            receiver: ControlReceiver {
                connection,
                stream: receive,
                head: [0; 4],
                head_len: 0,
                body: Vec::new(),
                body_len: 0,
            },
        }
    }

    /// Who is at the other end.
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// The two halves.
    pub fn split(self) -> (ControlSender, ControlReceiver) {
        (self.sender, self.receiver)
    }
}

impl ControlSender {
    /// Sends a message. Waits while the peer does not take any; if it never does, the link's idle time ends the wait.
    ///
    /// # Errors
    /// The message is too long, or the link is gone.
    pub async fn send(&mut self, message: &[u8]) -> Result<(), QuicError> {
        if message.len() > CONTROL_MESSAGE_MAX {
            return Err(QuicError::TooLong {
                len: message.len() as u64,
                max: CONTROL_MESSAGE_MAX,
            });
        }
        let head = (message.len() as u32).to_le_bytes();
        for part in [&head[..], message] {
            let sent = self.stream.write_all(part).await;
            sent.map_err(|error| lost(&self.connection, &error.to_string()))?;
        }
        Ok(())
    }

    /// Closes the link. What was sent before may not arrive any more.
    pub fn close(&self, reason: &str) {
        self.connection
            .close(VarInt::from_u32(0), reason.as_bytes());
    }

    /// Ends the sending half and waits until the peer has everything, or the link is gone.
    pub async fn finish(mut self) {
        if self.stream.finish().is_ok() {
            let _ = self.stream.stopped().await;
        }
    }
}

impl ControlReceiver {
    /// The next message; none when the peer has ended its half.
    ///
    /// # Errors
    /// The link is gone, or a message is too long; the link is then closed.
    pub async fn recv(&mut self) -> Result<Option<Vec<u8>>, QuicError> {
        while self.head_len < self.head.len() {
            let got = self.stream.read(&mut self.head[self.head_len..]).await;
            match got.map_err(|error| self.failed(&error))? {
                Some(n) => self.head_len += n,
                None if self.head_len == 0 => return Ok(None),
                None => return Err(lost(&self.connection, "it ended within a message")),
            }
        }
        let len = u32::from_le_bytes(self.head) as usize;
        if len > CONTROL_MESSAGE_MAX {
            self.connection
                .close(VarInt::from_u32(1), b"the message is too long");
            return Err(QuicError::TooLong {
                len: len as u64,
                max: CONTROL_MESSAGE_MAX,
            });
        }
        while self.body_len < len {
            if self.body_len == self.body.len() {
                self.body.resize(len.min(self.body_len + GROWTH), 0);
            }
            let got = self.stream.read(&mut self.body[self.body_len..]).await;
            match got.map_err(|error| self.failed(&error))? {
                Some(n) => self.body_len += n,
                None => return Err(lost(&self.connection, "it ended within a message")),
            }
        }
        (self.head_len, self.body_len) = (0, 0);
        Ok(Some(std::mem::take(&mut self.body)))
    }

    fn failed(&self, error: &ReadError) -> QuicError {
        lost(&self.connection, &error.to_string())
    }
}

/// The error of a link that is gone; the connection knows the reason better than its streams.
fn lost(connection: &Connection, reason: &str) -> QuicError {
    let reason = match connection.close_reason() {
        Some(ConnectionError::ApplicationClosed(close)) => {
            format!("closed: {}", String::from_utf8_lossy(&close.reason))
        }
        Some(ConnectionError::LocallyClosed) => "closed here".to_owned(),
        Some(ConnectionError::TimedOut) => "nothing came from there any more".to_owned(),
        Some(error) => error.to_string(),
        None => reason.to_owned(),
    };
    QuicError::Lost {
        address: connection.remote_address(),
        reason,
    }
}
