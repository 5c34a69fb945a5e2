//! Real quinn over the loopback interface: keys, refusals, streams.

#![expect(clippy::unwrap_used, reason = "what a test sets up must work")]

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::time::timeout;
use transport::block::LANES;
use transport::quic::{
    CloseCode, Connection, Controller, Endpoint, Fingerprint, Identity, LaneReceiver, LaneSender,
    Protocol, QuicError, Tuning,
};

/// Nothing here takes longer, also on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// Both sides see the key that the other one has.
#[tokio::test]
async fn each_side_learns_the_others_key() {
    let pair = Pair::connect(&Tuning::default()).await;
    assert_eq!(pair.dialer.peer(), pair.listener_key);
    assert_eq!(pair.listener.peer(), pair.dialer_key);
    assert!(pair.dialer.is_dialer() && !pair.listener.is_dialer());
}

/// A listener that does not trust the dialer: `dial` succeeds, the first answer is the refusal.
#[tokio::test]
async fn the_listeners_refusal_reaches_the_dialer_with_its_words() {
    let pair = Pair::connect(&Tuning::default()).await;
    let mut control = pair.dialer.open_control().await.unwrap();
    control
        .sender
        .send(Bytes::from_static(b"hello"))
        .await
        .unwrap();
    pair.listener.refuse("run here: scaleaway trust add").await;
    let error = control
        .receiver
        .recv_some(&mut BytesMut::new())
        .await
        .unwrap_err();
    let QuicError::Refused { detail } = error else {
        panic!("{error}")
    };
    assert_eq!(detail, "run here: scaleaway trust add");
}

/// The same the other way round. QUIC hides an application's words until the handshake is
/// confirmed, which the dialer learns last.
#[tokio::test]
async fn the_dialers_refusal_reaches_the_listener_with_its_words() {
    let (dialer_end, listener_end, address) = endpoints(&Tuning::default());
    let refuse = async {
        let connection = dialer_end.dial(address).await.unwrap();
        connection.refuse("not my peer").await;
        dialer_end.close().await;
    };
    let refused = async {
        let connection = listener_end.accept().await.unwrap();
        connection.accept_control().await.unwrap_err()
    };
    let ((), error) = timeout(PATIENCE, async { tokio::join!(refuse, refused) })
        .await
        .unwrap();
    let QuicError::Refused { detail } = error else {
        panic!("{error}")
    };
    assert_eq!(detail, "not my peer");
}

/// A peer that speaks something else is turned away by TLS.
#[tokio::test]
async fn another_protocol_is_turned_away() {
    let (dialer_end, _, _) = endpoints(&Tuning {
        protocol: Protocol::BenchLink,
        ..Tuning::default()
    });
    let (_, _listener_end, address) = endpoints(&Tuning::default());
    let error = dialer_end.dial(address).await.unwrap_err();
    assert!(matches!(error, QuicError::Protocol(_)), "{error}");
}

/// Nobody listens: an error after the idle timeout, and it says where.
#[tokio::test]
async fn silence_is_an_error_in_time() {
    let tuning = Tuning {
        idle_timeout: Duration::from_millis(300),
        ..Tuning::default()
    };
    let (dialer_end, _, _) = endpoints(&tuning);
    let silent = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = silent.local_addr().unwrap();
    let error = timeout(PATIENCE, dialer_end.dial(address))
        .await
        .unwrap()
        .unwrap_err();
    assert!(
        matches!(error, QuicError::NoAnswer { address: said } if said == address),
        "{error}"
    );
}

/// A caller that never finishes its handshake does not keep others out.
#[tokio::test]
async fn a_silent_caller_blocks_nobody() {
    let (dialer_end, listener_end, address) = endpoints(&Tuning::default());
    let junk = std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    for length in [0, 1, 20, 1200] {
        junk.send_to(&vec![0xc3; length], address).unwrap();
    }
    let dialed = timeout(PATIENCE, dialer_end.dial(address))
        .await
        .unwrap()
        .unwrap();
    let accepted = timeout(PATIENCE, listener_end.accept())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(dialed.remote_address(), address);
    assert_ne!(accepted.peer(), dialed.peer());
}

/// Lanes arrive in order and whole, though they are written side by side, and an end right after
/// `finish` loses nothing.
#[tokio::test]
async fn lanes_keep_their_order_and_lose_nothing_at_the_end() {
    let pair = Pair::connect(&Tuning::default()).await;
    let (lanes, receivers) = pair.lanes().await;
    let source = async {
        for mut lane in lanes {
            let index = u8::try_from(lane.index()).unwrap();
            for piece in 0..20u8 {
                lane.send(Bytes::from(vec![index ^ piece; 10_000]))
                    .await
                    .unwrap();
            }
            lane.finish().await.unwrap();
        }
        pair.dialer.close(CloseCode::Done, "");
    };
    let target = async {
        for (index, mut lane) in receivers.into_iter().enumerate() {
            assert_eq!(lane.index(), index);
            let mut content = BytesMut::new();
            while let Some(bytes) = lane.recv().await.unwrap() {
                content.extend_from_slice(&bytes);
            }
            assert_eq!(content.len(), 200_000);
            for (piece, bytes) in content.chunks(10_000).enumerate() {
                let expected = u8::try_from(index ^ piece).unwrap();
                assert!(
                    bytes.iter().all(|byte| *byte == expected),
                    "lane {index} piece {piece}"
                );
            }
        }
    };
    timeout(PATIENCE, async { tokio::join!(source, target) })
        .await
        .unwrap();
    let end = timeout(PATIENCE, pair.listener.closed()).await.unwrap();
    assert!(
        matches!(end, QuicError::PeerClosed { code: 0, .. }),
        "{end}"
    );
}

/// All lanes full and nobody reading them: a control message still goes through at once, both
/// ways, because lanes cannot use up the connection's windows.
#[tokio::test]
async fn control_passes_beside_lanes_that_are_full() {
    let pair = Pair::connect(&Tuning::default()).await;
    let (lanes, receivers) = pair.lanes().await;
    let mut fillers = tokio::task::JoinSet::new();
    for lane in lanes {
        fillers.spawn(fill(lane));
    }
    // Every lane has taken its whole window when none has moved for a while.
    let mut sent = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(300)).await;
        let now = pair.dialer.link_sample().udp_tx_bytes;
        if now > 30_000_000 && now - sent < 10_000 {
            break;
        }
        sent = now;
    }
    let mut dialer = pair.dialer.open_control().await.unwrap();
    dialer
        .sender
        .send(Bytes::from_static(b"ping"))
        .await
        .unwrap();
    let mut listener = timeout(PATIENCE, pair.listener.accept_control())
        .await
        .unwrap()
        .unwrap();
    for _ in 0..10 {
        let started = now();
        listener
            .sender
            .send(Bytes::from_static(b"pong"))
            .await
            .unwrap();
        let mut buffer = BytesMut::new();
        let received = timeout(PATIENCE, dialer.receiver.recv_some(&mut buffer)).await;
        assert_eq!(received.unwrap().unwrap(), Some(4));
        dialer
            .sender
            .send(Bytes::from_static(b"ping"))
            .await
            .unwrap();
        let received = timeout(PATIENCE, listener.receiver.recv_some(&mut buffer)).await;
        assert_eq!(received.unwrap().unwrap(), Some(4));
        assert!(started.elapsed() < Duration::from_secs(1));
    }
    fillers.abort_all();
    drop(receivers);
}

/// Every controller carries data, and ours tells what it measured.
#[tokio::test]
async fn controllers_carry_data_and_ours_measures_the_link() {
    for controller in [Controller::Scaleaway, Controller::Cubic, Controller::Bbr] {
        let pair = Pair::connect(&Tuning {
            controller,
            ..Tuning::default()
        })
        .await;
        let (mut lanes, mut receivers) = pair.lanes().await;
        let (mut lane, mut receiver) = (lanes.remove(0), receivers.remove(0));
        let source = async {
            for _ in 0..64 {
                lane.send(Bytes::from(vec![7; 256 * 1024])).await.unwrap();
            }
            lane.finish().await.unwrap();
        };
        let target = async {
            let mut total = 0;
            while let Some(bytes) = receiver.recv().await.unwrap() {
                total += bytes.len();
            }
            assert_eq!(total, 64 * 256 * 1024);
        };
        timeout(PATIENCE, async { tokio::join!(source, target) })
            .await
            .unwrap();
        let sample = pair.dialer.link_sample();
        assert_eq!(
            sample.rate_bps.is_some(),
            controller == Controller::Scaleaway,
            "{sample:?}"
        );
        assert!(
            sample.udp_tx_bytes > 64 * 256 * 1024 && sample.mtu >= 1200,
            "{sample:?}"
        );
    }
}

/// A dropped lane is an error for the source, not silence.
#[tokio::test]
async fn a_lane_dropped_by_the_target_is_an_error_at_the_source() {
    let pair = Pair::connect(&Tuning::default()).await;
    let (lanes, receivers) = pair.lanes().await;
    drop(receivers);
    let lane = lanes.into_iter().next().unwrap();
    let error = timeout(PATIENCE, fill(lane)).await.unwrap();
    assert!(matches!(error, QuicError::PeerStreams { .. }), "{error}");
}

struct Pair {
    dialer: Connection,
    listener: Connection,
    dialer_key: Fingerprint,
    listener_key: Fingerprint,
    _endpoints: (Endpoint, Endpoint),
}

impl Pair {
    async fn connect(tuning: &Tuning) -> Self {
        let (dialer_identity, listener_identity) =
            (Identity::generate().unwrap(), Identity::generate().unwrap());
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let listener_end = Endpoint::bind(any, &listener_identity, tuning).unwrap();
        let address = listener_end.local_address().unwrap();
        let dialer_end = Endpoint::bind_to_dial(address, &dialer_identity, tuning).unwrap();
        let both = async { tokio::join!(dialer_end.dial(address), listener_end.accept()) };
        let (dialer, listener) = timeout(PATIENCE, both).await.unwrap();
        Self {
            dialer: dialer.unwrap(),
            listener: listener.unwrap(),
            dialer_key: dialer_identity.fingerprint(),
            listener_key: listener_identity.fingerprint(),
            _endpoints: (dialer_end, listener_end),
        }
    }

    async fn lanes(&self) -> (Vec<LaneSender>, Vec<LaneReceiver>) {
        let both = async { tokio::join!(self.dialer.open_lanes(), self.listener.accept_lanes()) };
        let (senders, receivers) = timeout(PATIENCE, both).await.unwrap();
        let (senders, receivers) = (senders.unwrap(), receivers.unwrap());
        assert_eq!((senders.len(), receivers.len()), (LANES, LANES));
        (senders, receivers)
    }
}

fn endpoints(tuning: &Tuning) -> (Endpoint, Endpoint, SocketAddr) {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let dialer = Endpoint::bind(any, &Identity::generate().unwrap(), tuning).unwrap();
    let listener = Endpoint::bind(any, &Identity::generate().unwrap(), tuning).unwrap();
    let address = listener.local_address().unwrap();
    (dialer, listener, address)
}

/// Sends until it cannot, and says why.
async fn fill(mut lane: LaneSender) -> QuicError {
    loop {
        if let Err(error) = lane.send(Bytes::from(vec![1; 64 * 1024])).await {
            return error;
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "a test of real sockets is a driver"
)]
fn now() -> Instant {
    Instant::now()
}
