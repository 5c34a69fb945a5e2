//! The link is cut while a guest runs without its last pages: it waits, and nothing is lost.
//!
//! ```text
//! send -> relay of packets -> receive        cut: the relay drops what comes
//! ```

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use testbed::clock;
use testbed::guest::Machine;
use testbed::pair::Pair;
use testbed::product::Running;
use testbed::requirement::{GUESTS, Requirement, met};

const MOVE_MAX: Duration = Duration::from_secs(120);
/// QUIC gives a silent connection up after 15 s.
const CUT: Duration = Duration::from_secs(20);
/// More than the link takes: thousands of pages are dirty at the stop.
const WRITES_PER_S: u32 = 8000;
const PACKET_MAX: usize = 2048;
/// No stop fits that.
const STUCK: [&str; 6] = [
    "--when-stuck",
    "post-copy",
    "--downtime",
    "1",
    "--max-bandwidth",
    "30M",
];

/// A relay of packets between one listener and whoever dials.
struct Relay {
    address: SocketAddr,
    is_cut: Arc<AtomicBool>,
    is_over: Arc<AtomicBool>,
}

impl Relay {
    fn start(to: &str) -> anyhow::Result<Self> {
        let front = UdpSocket::bind("127.0.0.1:0")?;
        front.set_read_timeout(Some(Duration::from_millis(200)))?;
        let relay = Relay {
            address: front.local_addr()?,
            is_cut: Arc::default(),
            is_over: Arc::default(),
        };
        let (to, is_cut, is_over) = (
            to.parse::<SocketAddr>()?,
            relay.is_cut.clone(),
            relay.is_over.clone(),
        );
        thread::spawn(move || forward(&front, to, &is_cut, &is_over));
        Ok(relay)
    }

    fn set_cut(&self, is_cut: bool) {
        self.is_cut.store(is_cut, Ordering::Release);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Release);
    }
}

/// Each dialer has a socket towards the listener, and a thread for the way back.
fn forward(
    front: &UdpSocket,
    to: SocketAddr,
    is_cut: &Arc<AtomicBool>,
    is_over: &Arc<AtomicBool>,
) -> anyhow::Result<()> {
    let mut dialers: HashMap<SocketAddr, UdpSocket> = HashMap::new();
    let mut packet = [0; PACKET_MAX];
    while !is_over.load(Ordering::Acquire) {
        let Ok((length, from)) = front.recv_from(&mut packet) else {
            continue;
        };
        if is_cut.load(Ordering::Acquire) {
            continue;
        }
        let back = match dialers.entry(from) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(way_back(front, to, from, is_cut, is_over)?),
        };
        back.send(&packet[..length]).ok();
    }
    Ok(())
}

/// A dialer's socket towards the listener, and the thread that takes answers back to it.
fn way_back(
    front: &UdpSocket,
    to: SocketAddr,
    from: SocketAddr,
    is_cut: &Arc<AtomicBool>,
    is_over: &Arc<AtomicBool>,
) -> anyhow::Result<UdpSocket> {
    let back = UdpSocket::bind("127.0.0.1:0")?;
    back.connect(to)?;
    back.set_read_timeout(Some(Duration::from_millis(200)))?;
    let (reader, front) = (back.try_clone()?, front.try_clone()?);
    let (is_cut, is_over) = (is_cut.clone(), is_over.clone());
    thread::spawn(move || {
        let mut packet = [0; PACKET_MAX];
        while !is_over.load(Ordering::Acquire) {
            let Ok(length) = reader.recv(&mut packet) else {
                continue;
            };
            if !is_cut.load(Ordering::Acquire) {
                front.send_to(&packet[..length], from).ok();
            }
        }
    });
    Ok(back)
}

/// Both agents live: the guest waits, the source comes again, the target names what it lacks.
#[test]
fn a_cut_link_loses_no_page() -> anyhow::Result<()> {
    if !met(&GUESTS)? || !met(&[Requirement::Product])? {
        return Ok(());
    }
    let mut machine = Machine::small();
    machine.load.writes_per_s = WRITES_PER_S;
    let mut pair = Pair::new("pc-cut", &machine)?;
    let relay = Relay::start(&pair.address())?;
    let mut receive = pair.receive(&[])?;
    let address = relay.address.to_string();
    let mut send = pair.send_by(&address, &pair.cloud, &STUCK, &[])?;
    clock::wait_until("the guest at the target", MOVE_MAX, || {
        Ok(pair.target.is_running()?.then_some(()))
    })?;
    relay.set_cut(true);
    clock::pause(CUT);
    let said = |send: &Running, receive: &Running| {
        format!("send:\n{}\nreceive:\n{}", send.output(), receive.output())
    };
    let story = said(&send, &receive);
    // Neither side has ended: pages were lacking, and still are.
    assert_eq!(
        (send.exit_code()?, receive.exit_code()?),
        (None, None),
        "{story}"
    );
    for product in [&pair.cloud, &pair.client] {
        assert_eq!(product.status()?[0]["settled"], false, "{story}");
    }
    relay.set_cut(false);
    let (sent, received) = (send.wait(MOVE_MAX)?, receive.wait(MOVE_MAX)?);
    let story = said(&send, &receive);
    assert_eq!((sent, received), (0, 0), "{story}");
    pair.source.wait_exit(Duration::from_secs(10))?;
    assert_eq!(pair.target.control()?.verify()?.errors, 0, "{story}");
    assert_eq!(pair.running_max(), 1);
    assert!(story.contains("the target lacks"), "{story}");
    let report = pair.report("receive")?["post_copy"].clone();
    assert!(report["faults"].as_u64() > Some(0), "{report}\n{story}");
    // Somebody waited through the cut.
    let stall = report["stall_ms"].as_u64();
    assert!(stall > Some(5_000), "{report}\n{story}");
    for product in [&pair.cloud, &pair.client] {
        assert_eq!(product.status()?[0]["settled"], true);
    }
    Ok(())
}
