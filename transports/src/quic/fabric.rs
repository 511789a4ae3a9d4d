//! The lanes of one worker and one epoch, each a stream.
//!
//! A lane's ball (both its slots) is either with the worker or with the lane's task. The worker posts it into the lane's outbox; the task writes the frame, reads
//! the peer's frame into the same ball, and puts it into the worker's inbox. A peer is lost as soon as one of its connections is; nothing arrives behind that.
//!
//! # How an end goes
//! An endpoint that is dropped drops its outboxes. Each lane task then writes what was posted and ends its stream. The other side reads to the end of all streams,
//! so it has every frame, and closes the connection; only then is the peer reported lost.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use quinn::{Connection, ConnectionError, RecvStream, SendStream, VarInt};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::ball::{Ball, BallEnd, Inbox, Link, Parcel, Seat, Spin};
use crate::{
    Endpoint, Event, Lane, LaneError, LostReason, MicroBatch, Role, Topology, Waker, WorkerId,
};

/// How long an end that is dropped waits for its peers to have read everything.
pub(crate) const LINGER: Duration = Duration::from_secs(2);

/// One worker's end of a QUIC fabric, made by [`QuicNode::join`](super::QuicNode::join).
pub struct QuicEndpoint {
    end: BallEnd<ToTask>,
    /// Called when the endpoint is dropped: its node expects nobody for it any more.
    _leave: Leave,
}

pub(crate) struct Leave(pub(super) Option<Box<dyn FnOnce() + Send>>);

impl Drop for Leave {
    fn drop(&mut self) {
        if let Some(leave) = self.0.take() {
            leave();
        }
    }
}

crate::ball::delegate_endpoint!(QuicEndpoint, end);

/// The way to a peer: the outboxes of its lanes, by micro-batch.
pub(super) struct ToTask {
    outboxes: Vec<mpsc::Sender<Box<Ball>>>,
    open: Arc<AtomicBool>,
}

impl Link for ToTask {
    fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    fn carry(&mut self, micro_batch: MicroBatch, ball: Box<Ball>) {
        // There is room for the lane's only ball. A task that is gone has left the peer's loss in the inbox.
        if let Some(outbox) = self.outboxes.get(usize::from(micro_batch.0)) {
            let _ = outbox.try_send(ball);
        }
    }

    fn close(&mut self) {
        self.outboxes.clear();
    }
}

/// What the tasks of one peer have.
pub(super) struct PeerSide {
    pub(super) me: WorkerId,
    /// Index of the peer.
    pub(super) peer: u16,
    pub(super) topology: Topology,
    /// By micro-batch, taken by the task of its lane.
    lanes: Vec<Option<LaneSide>>,
    inbox: Arc<Inbox>,
    open: Arc<AtomicBool>,
}

/// What the task of one lane has.
struct LaneSide {
    outbox: mpsc::Receiver<Box<Ball>>,
    /// The ball, if the other side begins.
    ball: Option<Box<Ball>>,
}

/// An endpoint and, for each peer, what its tasks need.
pub(super) fn build(
    me: WorkerId,
    topology: &Topology,
    spin: Spin,
    leave: Leave,
) -> (QuicEndpoint, Vec<PeerSide>) {
    let seat = Seat::new(me, topology);
    let peers = 0..topology.workers(me.role.opposite());
    let (mut links, mut sides) = (Vec::new(), Vec::new());
    for peer in peers {
        let open = Arc::new(AtomicBool::new(true));
        let (outboxes, lanes) = (0..topology.micro_batches)
            .map(|_| {
                let (outbox, receiver) = mpsc::channel(1);
                let begins = me.role == crate::FIRST_HOLDER;
                let lane = LaneSide {
                    outbox: receiver,
                    ball: (!begins).then(|| Box::new(Ball::new(topology))),
                };
                (outbox, Some(lane))
            })
            .unzip();
        links.push(ToTask {
            outboxes,
            open: Arc::clone(&open),
        });
        sides.push(PeerSide {
            me,
            peer,
            topology: *topology,
            lanes,
            inbox: Arc::clone(&seat.inbox),
            open,
        });
    }
    let end = BallEnd::new(topology, spin, links.into(), seat);
    (QuicEndpoint { end, _leave: leave }, sides)
}

impl PeerSide {
    /// Serves the peer over its connections, each with the micro-batches whose lanes it carries, until one of them ends; then reports the loss.
    pub(super) async fn serve(mut self, connections: Vec<(Connection, Vec<u8>)>) {
        let mut tasks = JoinSet::new();
        let handles: Vec<Connection> = connections.iter().map(|(c, _)| c.clone()).collect();
        for (connection, micro_batches) in connections {
            let lanes: Vec<(u8, LaneSide)> = micro_batches
                .into_iter()
                .filter_map(|index| Some((index, self.lanes.get_mut(usize::from(index))?.take()?)))
                .collect();
            tasks.spawn(serve_connection(
                connection,
                lanes,
                self.me,
                self.peer,
                Arc::clone(&self.inbox),
            ));
        }
        let mut reason = LostReason::Closed;
        while let Some(ended) = tasks.join_next().await {
            if let Some(lost) = ended.unwrap_or(Some(LostReason::Broken)) {
                reason = lost;
                break;
            }
        }
        tasks.shutdown().await;
        for connection in handles {
            connection.close(VarInt::from_u32(0), b"closed");
        }
        self.lose(reason);
    }

    /// Reports the peer lost. Nothing arrives from it any more.
    pub(super) fn lose(self, reason: LostReason) {
        self.open.store(false, Ordering::Release);
        self.inbox.deliver(Parcel::Lost {
            from: self.peer,
            reason,
        });
    }

    /// Notes that the peer takes no part: posts to it fail, and its loss is nothing to report.
    pub(super) fn absent(self) {
        self.open.store(false, Ordering::Release);
    }

    /// Whether the worker's end is gone.
    pub(super) fn is_abandoned(&self) -> bool {
        self.inbox.is_closed()
    }
}

/// Serves the lanes of one connection. `None`: both sides have ended all of them in order.
async fn serve_connection(
    connection: Connection,
    lanes: Vec<(u8, LaneSide)>,
    me: WorkerId,
    peer: u16,
    inbox: Arc<Inbox>,
) -> Option<LostReason> {
    let mut tasks = JoinSet::new();
    let count = lanes.len();
    let mut lanes: Vec<Option<(u8, LaneSide)>> = lanes.into_iter().map(Some).collect();
    for turn in 0..count {
        let (lane, streams) = match me.role {
            // The caller opens a stream for each lane, and says which.
            Role::Attention => {
                let lane = lanes[turn].take()?;
                let opened = open_lane(&connection, lane.0).await;
                (lane, opened)
            }
            Role::Expert => {
                let accepted = accept_lane(&connection).await;
                let Ok((index, streams)) = accepted else {
                    return Some(reason(&connection));
                };
                let named = |lane: &&mut Option<(u8, LaneSide)>| {
                    lane.as_ref().is_some_and(|lane| lane.0 == index)
                };
                let Some(lane) = lanes.iter_mut().find(named).and_then(Option::take) else {
                    connection.close(VarInt::from_u32(1), b"no such lane, or named twice");
                    return Some(LostReason::Broken);
                };
                (lane, Ok(streams))
            }
        };
        let Ok(streams) = streams else {
            return Some(reason(&connection));
        };
        let (index, side) = lane;
        let lane = LaneTask {
            me,
            peer,
            micro_batch: MicroBatch(index),
            inbox: Arc::clone(&inbox),
        };
        tasks.spawn(lane.rally(side, streams));
    }
    let mut ours = false;
    while let Some(ended) = tasks.join_next().await {
        match ended {
            Ok(Ended::There) => {}
            Ok(Ended::Here) => ours = true,
            Ok(Ended::Broken(why)) => {
                connection.close(VarInt::from_u32(1), why.as_bytes());
                return Some(LostReason::Broken);
            }
            Ok(Ended::Lost) | Err(_) => return Some(reason(&connection)),
        }
    }
    if ours {
        // The peer closes when it has read everything.
        let _ = tokio::time::timeout(LINGER, connection.closed()).await;
    }
    None
}

async fn open_lane(
    connection: &Connection,
    micro_batch: u8,
) -> Result<(SendStream, RecvStream), ConnectionError> {
    let (mut send, receive) = connection.open_bi().await?;
    if send.write_all(&[micro_batch]).await.is_err() {
        return Err(connection.close_reason().unwrap_or(ConnectionError::Reset));
    }
    Ok((send, receive))
}

async fn accept_lane(connection: &Connection) -> Result<(u8, (SendStream, RecvStream)), ()> {
    let (send, mut receive) = connection.accept_bi().await.map_err(drop)?;
    let mut index = [0];
    receive.read_exact(&mut index).await.map_err(drop)?;
    Ok((index[0], (send, receive)))
}

/// Why a connection ended, as far as the worker is concerned.
pub(crate) fn reason(connection: &Connection) -> LostReason {
    match connection.close_reason() {
        Some(ConnectionError::TimedOut) => LostReason::TimedOut,
        Some(ConnectionError::ApplicationClosed(close))
            if close.error_code == VarInt::from_u32(0) =>
        {
            LostReason::Closed
        }
        _ => LostReason::Broken,
    }
}

struct LaneTask {
    me: WorkerId,
    peer: u16,
    micro_batch: MicroBatch,
    inbox: Arc<Inbox>,
}

/// How a lane ended.
enum Ended {
    /// The peer ended it in order.
    There,
    /// Our endpoint was dropped.
    Here,
    /// The connection is gone.
    Lost,
    /// The peer broke the protocol.
    Broken(&'static str),
}

impl LaneTask {
    /// Frames out and in, in turns.
    async fn rally(self, mut side: LaneSide, streams: (SendStream, RecvStream)) -> Ended {
        let (mut send, mut receive) = streams;
        let mut awaited = side.ball.take();
        loop {
            if let Some(mut ball) = awaited.take() {
                let read = tokio::select! {
                    read = read_frame(&mut receive, &mut ball, self.me.role) => read,
                    // Nothing is posted while the ball is out, so this is the end of the endpoint.
                    _ = side.outbox.recv() => return finish(send).await,
                };
                if let Err(ended) = read {
                    if let Ended::There = ended {
                        let _ = send.finish();
                    }
                    return ended;
                }
                self.inbox.deliver(Parcel::Frame {
                    from: self.peer,
                    micro_batch: self.micro_batch,
                    ball,
                });
            }
            let mut early = [0];
            let posted = tokio::select! {
                biased;
                posted = side.outbox.recv() => posted,
                // The peer does not have the ball: it can only end the lane.
                early = receive.read(&mut early) => {
                    let _ = send.finish();
                    return match early {
                        Ok(None) => Ended::There,
                        Ok(Some(_)) => Ended::Broken("a frame came out of turn"),
                        Err(_) => Ended::Lost,
                    };
                }
            };
            let Some(mut ball) = posted else {
                return finish(send).await;
            };
            if write_frame(&mut send, &mut ball, self.me.role)
                .await
                .is_err()
            {
                return Ended::Lost;
            }
            awaited = Some(ball);
        }
    }
}

/// Ends our half when everything is written.
async fn finish(mut send: SendStream) -> Ended {
    let _ = send.finish();
    Ended::Here
}

async fn write_frame(
    send: &mut SendStream,
    ball: &mut Ball,
    role: Role,
) -> Result<(), quinn::WriteError> {
    let frame = ball.sent_by(role).frame();
    send.write_all(&(frame.len() as u32).to_le_bytes()).await?;
    send.write_all(frame).await
}

async fn read_frame(receive: &mut RecvStream, ball: &mut Ball, role: Role) -> Result<(), Ended> {
    let mut head = [0; 4];
    let mut have = 0;
    while have < head.len() {
        match receive.read(&mut head[have..]).await {
            Ok(Some(n)) => have += n,
            Ok(None) if have == 0 => return Err(Ended::There),
            Ok(None) => return Err(Ended::Broken("a frame was cut off")),
            Err(_) => return Err(Ended::Lost),
        }
    }
    let len = u32::from_le_bytes(head) as usize;
    let slot = ball.slot_mut(role.opposite());
    if len > slot.capacity() {
        return Err(Ended::Broken("a frame is longer than its slot"));
    }
    match receive.read_exact(&mut slot.buffer()[..len]).await {
        Ok(()) => {
            slot.fill(len);
            Ok(())
        }
        Err(quinn::ReadExactError::FinishedEarly(_)) => Err(Ended::Broken("a frame was cut off")),
        Err(quinn::ReadExactError::ReadError(_)) => Err(Ended::Lost),
    }
}
