//! The streams of a connection: one for control both ways, eight lanes one way.
//!
//! ```text
//! control   bidirectional, opened by the dialer, which sends first     priority 10
//! lane 0..8 unidirectional, opened by the source, first byte = number  priority 0
//! urgent    the same, behind the lanes, first byte = 8: post-copy alone  priority 20
//! ```
//!
//! A lane is read in order. Its stream window, and that of control, is far below the connection's
//! (see `tuning`), so lanes at full rate cannot stop a control message from being written; the
//! priority puts it into the next packet.

use bytes::{Bytes, BytesMut};
use quinn::{Connection, ReadError, RecvStream, SendStream, StoppedError, WriteError};

use super::QuicError;
use crate::block::LANES;

const URGENT_PRIORITY: i32 = 20;
const CONTROL_PRIORITY: i32 = 10;
const LANE_PRIORITY: i32 = 0;
/// First byte of the urgent stream: the number behind those of the lanes.
const URGENT_NUMBER: u8 = 8;
const _: () = assert!(URGENT_NUMBER as usize == LANES);
/// Most bytes that one read takes over from QUIC.
const READ_MAX_BYTES: usize = 256 * 1024;

/// The control stream, whole.
#[derive(Debug)]
pub struct ControlStream {
    /// The half that sends.
    pub sender: ControlSender,
    /// The half that receives.
    pub receiver: ControlReceiver,
}

/// The sending half of the control stream.
#[derive(Debug)]
pub struct ControlSender(SendStream);

/// The receiving half of the control stream.
#[derive(Debug)]
pub struct ControlReceiver(RecvStream);

/// The source's end of a lane.
#[derive(Debug)]
pub struct LaneSender {
    index: usize,
    stream: SendStream,
}

/// The target's end of a lane.
#[derive(Debug)]
pub struct LaneReceiver {
    index: usize,
    stream: RecvStream,
}

/// The source's end of the urgent stream.
#[derive(Debug)]
pub struct UrgentSender(SendStream);

/// The target's end of the urgent stream.
#[derive(Debug)]
pub struct UrgentReceiver(RecvStream);

impl UrgentSender {
    /// Sends bytes; returns when QUIC has taken them. Not cancel safe.
    ///
    /// # Errors
    /// The connection's end, or that the peer no longer reads.
    pub async fn send(&mut self, bytes: Bytes) -> Result<(), QuicError> {
        self.0.write_chunk(bytes).await.map_err(write_error)
    }
}

impl UrgentReceiver {
    /// The next bytes in order, or `None` at the stream's end. Cancel safe.
    ///
    /// # Errors
    /// The connection's end, or that the peer dropped the stream.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, QuicError> {
        receive(&mut self.0).await
    }
}

impl ControlSender {
    /// Sends bytes; returns when QUIC has taken them, which says nothing of their arrival. Not
    /// cancel safe: a dropped call may have sent a part.
    ///
    /// # Errors
    /// The connection's end, or that the peer no longer reads.
    pub async fn send(&mut self, bytes: Bytes) -> Result<(), QuicError> {
        self.0.write_chunk(bytes).await.map_err(write_error)
    }

    /// Ends the stream and waits until the peer's QUIC has acknowledged every byte.
    ///
    /// # Errors
    /// The connection's end, or that the peer no longer reads.
    pub async fn finish(self) -> Result<(), QuicError> {
        finish(self.0).await
    }
}

impl ControlReceiver {
    /// Appends what has arrived to `buffer`, at least one byte; returns how many, or `None` when
    /// the peer has ended the stream. Cancel safe.
    ///
    /// # Errors
    /// The connection's end, or that the peer dropped the stream.
    pub async fn recv_some(&mut self, buffer: &mut BytesMut) -> Result<Option<usize>, QuicError> {
        let chunk = receive(&mut self.0).await?;
        Ok(chunk.map(|chunk| {
            buffer.extend_from_slice(&chunk);
            chunk.len()
        }))
    }
}

impl LaneSender {
    /// Number of the lane, 0 to 7.
    pub fn index(&self) -> usize {
        self.index
    }

    /// Sends bytes without a copy; returns when QUIC has taken them, which may be megabytes before
    /// they leave: progress is what the target says that it applied. Not cancel safe.
    ///
    /// # Errors
    /// The connection's end, or that the peer no longer reads.
    pub async fn send(&mut self, bytes: Bytes) -> Result<(), QuicError> {
        self.stream.write_chunk(bytes).await.map_err(write_error)
    }

    /// Ends the lane and waits until the peer's QUIC has acknowledged every byte.
    ///
    /// # Errors
    /// The connection's end, or that the peer no longer reads.
    pub async fn finish(self) -> Result<(), QuicError> {
        finish(self.stream).await
    }
}

impl LaneReceiver {
    /// Number of the lane, 0 to 7.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The next bytes in order, at most 256 KiB, or `None` at the lane's end. Cancel safe.
    ///
    /// # Errors
    /// The connection's end, or that the peer dropped the lane.
    pub async fn recv(&mut self) -> Result<Option<Bytes>, QuicError> {
        receive(&mut self.stream).await
    }
}

pub(super) async fn open_control(connection: &Connection) -> Result<ControlStream, QuicError> {
    let (send, receive) = connection.open_bi().await?;
    control(send, receive)
}

pub(super) async fn accept_control(connection: &Connection) -> Result<ControlStream, QuicError> {
    let (send, receive) = connection.accept_bi().await?;
    control(send, receive)
}

fn control(send: SendStream, receive: RecvStream) -> Result<ControlStream, QuicError> {
    send.set_priority(CONTROL_PRIORITY)
        .map_err(|_closed| QuicError::LocalClosed)?;
    Ok(ControlStream {
        sender: ControlSender(send),
        receiver: ControlReceiver(receive),
    })
}

pub(super) async fn open_lanes(connection: &Connection) -> Result<Vec<LaneSender>, QuicError> {
    let mut lanes = Vec::with_capacity(LANES);
    for index in 0..LANES {
        let mut stream = connection.open_uni().await?;
        stream
            .set_priority(LANE_PRIORITY)
            .map_err(|_closed| QuicError::LocalClosed)?;
        let number = u8::try_from(index).expect("there are eight lanes");
        stream.write_all(&[number]).await.map_err(write_error)?;
        lanes.push(LaneSender { index, stream });
    }
    Ok(lanes)
}

pub(super) async fn accept_lanes(connection: &Connection) -> Result<Vec<LaneReceiver>, QuicError> {
    let mut lanes = Vec::with_capacity(LANES);
    for index in 0..LANES {
        // Streams come in the order in which they were opened, whatever the network did.
        let mut stream = connection.accept_uni().await?;
        let mut number = [0u8];
        if stream.read(&mut number).await.map_err(read_error)? != Some(1) {
            return Err(QuicError::PeerStreams {
                what: "a lane ended before its number",
            });
        }
        if usize::from(number[0]) != index {
            return Err(QuicError::PeerStreams {
                what: "a lane has a wrong number",
            });
        }
        lanes.push(LaneReceiver { index, stream });
    }
    Ok(lanes)
}

/// Behind the lanes of this connection.
pub(super) async fn open_urgent(connection: &Connection) -> Result<UrgentSender, QuicError> {
    let mut stream = connection.open_uni().await?;
    stream
        .set_priority(URGENT_PRIORITY)
        .map_err(|_closed| QuicError::LocalClosed)?;
    stream
        .write_all(&[URGENT_NUMBER])
        .await
        .map_err(write_error)?;
    Ok(UrgentSender(stream))
}

pub(super) async fn accept_urgent(connection: &Connection) -> Result<UrgentReceiver, QuicError> {
    let mut stream = connection.accept_uni().await?;
    let mut number = [0u8];
    let read = stream.read(&mut number).await.map_err(read_error)?;
    if read != Some(1) || number[0] != URGENT_NUMBER {
        return Err(QuicError::PeerStreams {
            what: "a stream behind the lanes is not the urgent one",
        });
    }
    Ok(UrgentReceiver(stream))
}

async fn receive(stream: &mut RecvStream) -> Result<Option<Bytes>, QuicError> {
    let chunk = stream
        .read_chunk(READ_MAX_BYTES, true)
        .await
        .map_err(read_error)?;
    Ok(chunk.map(|chunk| chunk.bytes))
}

/// A close right after `finish` would throw away what is unsent; this waits for all of it.
async fn finish(mut stream: SendStream) -> Result<(), QuicError> {
    stream.finish().map_err(|_closed| QuicError::LocalClosed)?;
    match stream.stopped().await {
        Ok(None) => Ok(()),
        Ok(Some(_code)) => Err(QuicError::PeerStreams {
            what: "stopped reading a stream",
        }),
        Err(StoppedError::ConnectionLost(error)) => Err(error.into()),
        Err(StoppedError::ZeroRttRejected) => Err(QuicError::LocalClosed),
    }
}

fn write_error(error: WriteError) -> QuicError {
    match error {
        WriteError::ConnectionLost(error) => error.into(),
        WriteError::Stopped(_) => QuicError::PeerStreams {
            what: "stopped reading a stream",
        },
        WriteError::ClosedStream | WriteError::ZeroRttRejected => QuicError::LocalClosed,
    }
}

fn read_error(error: ReadError) -> QuicError {
    match error {
        ReadError::ConnectionLost(error) => error.into(),
        ReadError::Reset(_) => QuicError::PeerStreams {
            what: "dropped a stream",
        },
        ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => {
            QuicError::LocalClosed
        }
    }
}
