//! Links for messages of any kind between two processes: length-prefixed, in order, over one stream.

use std::net::SocketAddr;

use quinn::{Connection, ConnectionError, ReadError, RecvStream, SendStream, VarInt};

use super::framing::{self, CONTROL_MESSAGE_MAX, Framing, Overlong};
use super::{NodeRole, QuicError};
use crate::WorkerId;

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
    framing: Framing,
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
                framing: Framing::default(),
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
        let head = framing::head(message).ok_or(QuicError::TooLong {
            len: message.len() as u64,
            max: CONTROL_MESSAGE_MAX,
        })?;
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
        loop {
            let got = self.stream.read(self.framing.room()).await;
            let Some(count) = got.map_err(|error| self.failed(&error))? else {
                return match self.framing.is_within() {
                    false => Ok(None),
                    true => Err(lost(&self.connection, "it ended within a message")),
                };
            };
            match self.framing.filled(count) {
                Ok(None) => {}
                Ok(message) => return Ok(message),
                Err(Overlong(len)) => {
                    self.connection
                        .close(VarInt::from_u32(1), b"the message is too long");
                    return Err(QuicError::TooLong {
                        len,
                        max: CONTROL_MESSAGE_MAX,
                    });
                }
            }
        }
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
