//! Two real QUIC connections over the modelled link, in virtual time: what a controller makes of a
//! link, without sockets, sleeps or luck.
//!
//! The connections are quinn's own state machines with our transport parameters, so the pacer, the
//! loss detection and the ACK rules are the real ones; timers fire on whole milliseconds as tokio's
//! do. Chance comes from the links' seeds. Key material differs from run to run but no packet's
//! size or time depends on it.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn_proto::{
    ClientConfig, Connection, ConnectionHandle, DatagramEvent, Dir, Endpoint, EndpointConfig,
    Event, ReadableError, ServerConfig, StreamId,
};
use testbed_link::{Link, LinkParams, Random};

use super::super::{Controller, Identity, Tuning, tls};
use super::rival::{ACK_BYTES, PACKET_BYTES, PAYLOAD_BYTES, Rival};
use super::{Estimate, Scaleaway, Shaping};
use crate::block::LANES;

/// IPv4 and UDP headers.
const HEADER_BYTES: usize = 28;
/// Quinn's batch of datagrams that leave in one system call.
const BATCH: usize = 10;
/// How often the queue is looked at.
const PROBE: Duration = Duration::from_millis(50);

/// What happened between two moments.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Bytes that each target's application read, in bit/s.
    pub(super) goodput_bps: Vec<f64>,
    /// Time that a packet would have waited in the data direction's queue.
    queue_ms: Vec<f64>,
    /// Packets that did not fit the queue.
    pub(super) queue_drops: u64,
}

impl Outcome {
    /// Waiting time that is not passed by this share of the probes.
    pub(super) fn queue_ms_at(&self, share: f64) -> f64 {
        let mut sorted = self.queue_ms.clone();
        sorted.sort_by(f64::total_cmp);
        let places = u32::try_from(sorted.len()).expect("few probes");
        let place = (0..places).find(|place| f64::from(place + 1) >= share * f64::from(places));
        place
            .and_then(|place| sorted.get(place as usize))
            .copied()
            .unwrap_or(0.0)
    }
}

/// Sources that always have data, targets that always read, and the link that they share.
pub(super) struct Simulation {
    start: Instant,
    now: Duration,
    flows: Vec<Flow>,
    rival: Option<Rival>,
    shapings: Vec<Shaping>,
    forward: Link<Packet>,
    backward: Link<Packet>,
}

struct Flow {
    source: Side,
    target: Side,
    received_bytes: u64,
}

/// Stands for the rival where flows have their numbers.
const RIVAL: usize = usize::MAX;

/// The flow that a datagram belongs to, and the datagram.
type Packet = (usize, Vec<u8>);

impl Simulation {
    pub(super) fn new(link: &LinkParams, controller: Controller, seed: u64) -> Self {
        #[expect(
            clippy::disallowed_methods,
            reason = "virtual time counts from any instant"
        )]
        let start = Instant::now();
        let link = |seed| Link::new(*link, seed).expect("sound parameters");
        let mut simulation = Self {
            start,
            now: Duration::ZERO,
            flows: Vec::new(),
            rival: None,
            shapings: Vec::new(),
            forward: link(seed),
            backward: link(seed ^ 0x5eed),
        };
        simulation.add_flow(controller);
        simulation
    }

    /// Another pair of hosts begins.
    pub(super) fn add_flow(&mut self, controller: Controller) {
        let tuning = Tuning {
            controller,
            ..Tuning::default()
        };
        self.shapings.push(tuning.shaping.clone());
        self.flows.push(Flow {
            source: Side::dialer(&tuning, self.start + self.now),
            target: Side::listener(&tuning),
            received_bytes: 0,
        });
    }

    /// Somebody with the kernel's BBR begins; its goodput stands behind the flows'.
    pub(super) fn add_rival(&mut self) {
        self.rival = Some(Rival::new(self.now));
    }

    /// Lets time pass.
    pub(super) fn run(&mut self, time: Duration) -> Outcome {
        let (begin, end) = (self.now, self.now + time);
        let received_before = self.received_bytes();
        let drops_before = self.forward.counters().queue_drops.packets;
        let mut queue_ms = Vec::new();
        let mut probe_at = begin;
        while self.now < end {
            if self.now >= probe_at {
                let bits = self.forward.queue_bytes() * 8;
                queue_ms.push(bits as f64 * 1e3 / self.forward.params().rate_bps as f64);
                probe_at += PROBE;
            }
            self.step();
            // An event that is due at once still moves time on, or a bug would hang the test.
            let soonest = self.now + Duration::from_nanos(1);
            let next = self.next_event().unwrap_or(end);
            self.now = next.clamp(soonest, end.min(probe_at).max(soonest));
        }
        let received = self.received_bytes();
        let grown = received.iter().zip(received_before);
        Outcome {
            goodput_bps: grown
                .map(|(after, before)| (after - before) as f64 * 8.0 / time.as_secs_f64())
                .collect(),
            queue_ms,
            queue_drops: self.forward.counters().queue_drops.packets - drops_before,
        }
    }

    /// The settings of a flow, to change them.
    pub(super) fn shaping(&self, flow: usize) -> &Shaping {
        &self.shapings[flow]
    }

    /// The source of a flow has no more data.
    pub(super) fn end_flow(&mut self, flow: usize) {
        self.flows[flow].source.is_done = true;
    }

    /// Both hosts of the first flow are busy with other things for up to `length_max` at a time.
    pub(super) fn set_naps(&mut self, length_max: Duration, every_max: Duration) {
        let now = self.now;
        let naps = |seed| Naps {
            random: Random::new(seed),
            length_max,
            every_max,
            next_at: now,
            until: now,
        };
        self.flows[0].source.naps = Some(naps(1));
        self.flows[0].target.naps = Some(naps(2));
    }

    /// Changes the data direction.
    pub(super) fn set_link(&mut self, link: &LinkParams) {
        self.forward
            .set_params(self.now, *link)
            .expect("sound parameters");
    }

    /// Cuts both directions, or mends them.
    pub(super) fn set_cut(&mut self, cut: bool) {
        for link in [&mut self.forward, &mut self.backward] {
            if cut { link.cut(self.now) } else { link.mend() }
        }
    }

    /// What our controller of the first flow knows.
    pub(super) fn estimate(&self) -> Estimate {
        let (_, connection) = self.flows[0]
            .source
            .connection
            .as_ref()
            .expect("it dialled");
        let controller = connection.congestion_state().clone_box().into_any();
        let controller = controller.downcast::<Scaleaway>().expect("it is ours");
        controller.estimate()
    }

    fn received_bytes(&self) -> Vec<u64> {
        let flows = self.flows.iter().map(|flow| flow.received_bytes);
        let rival = self
            .rival
            .iter()
            .map(|rival| rival.received * PAYLOAD_BYTES);
        flows.chain(rival).collect()
    }

    fn next_event(&mut self) -> Option<Duration> {
        let start = self.start;
        let at = self.now;
        let flows = self.flows.iter_mut();
        let timers = flows.flat_map(|flow| {
            [
                flow.source.timeout(start, at),
                flow.target.timeout(start, at),
            ]
        });
        let links = [self.forward.next_delivery(), self.backward.next_delivery()];
        let rival = self.rival.as_ref().map(Rival::due);
        timers.chain(links).chain(rival).flatten().min()
    }

    fn step(&mut self) {
        let (now, at) = (self.start + self.now, self.now);
        while let Some((flow, datagram)) = self.forward.poll(at) {
            if flow == RIVAL {
                self.rival.iter_mut().for_each(|rival| rival.received += 1);
                let _verdict = self.backward.offer(at, ACK_BYTES, (RIVAL, datagram));
                continue;
            }
            self.flows[flow].target.inbox.push_back(datagram);
        }
        while let Some((flow, datagram)) = self.backward.poll(at) {
            if let (RIVAL, Some(rival)) = (flow, &mut self.rival) {
                let number = datagram.try_into().expect("eight bytes");
                rival.acked(at, u64::from_be_bytes(number));
                continue;
            }
            self.flows[flow].source.inbox.push_back(datagram);
        }
        while let Some(number) = self.rival.as_mut().and_then(|rival| rival.send(at)) {
            let number = number.to_be_bytes().to_vec();
            let _verdict = self.forward.offer(at, PACKET_BYTES, (RIVAL, number));
        }
        for (number, flow) in self.flows.iter_mut().enumerate() {
            let back = &mut Outlet {
                link: &mut self.backward,
                at,
                flow: number,
            };
            flow.received_bytes += flow.target.turn(now, back);
            let forth = &mut Outlet {
                link: &mut self.forward,
                at,
                flow: number,
            };
            flow.source.turn(now, forth);
        }
    }
}

/// A host that shares its processors: it naps at random times, and then does all at once.
struct Naps {
    random: Random,
    /// Longest nap.
    length_max: Duration,
    /// Longest time between two.
    every_max: Duration,
    next_at: Duration,
    until: Duration,
}

impl Naps {
    fn is_asleep(&mut self, at: Duration) -> bool {
        if at >= self.next_at {
            let random = |most: Duration, random: &mut Random| {
                let most = u64::try_from(most.as_nanos()).expect("within the test");
                Duration::from_nanos(random.up_to(most))
            };
            self.until = at + random(self.length_max, &mut self.random);
            self.next_at = self.until + random(self.every_max, &mut self.random);
        }
        at < self.until
    }
}

/// Where a side's datagrams go.
struct Outlet<'a> {
    link: &'a mut Link<Packet>,
    at: Duration,
    flow: usize,
}

impl Outlet<'_> {
    fn offer(&mut self, datagram: &[u8]) {
        let length = u32::try_from(datagram.len() + HEADER_BYTES).expect("datagrams are small");
        // A dropped packet is what the test is about.
        let _verdict = self
            .link
            .offer(self.at, length, (self.flow, datagram.to_vec()));
    }
}

/// One host: endpoint, connection, and a very simple program.
struct Side {
    endpoint: Endpoint,
    connection: Option<(ConnectionHandle, Connection)>,
    peer: SocketAddr,
    inbox: VecDeque<Vec<u8>>,
    naps: Option<Naps>,
    dials: bool,
    is_done: bool,
    lanes: Vec<StreamId>,
    payload: Bytes,
    /// Reused for every datagram that is built.
    buffer: Vec<u8>,
}

impl Side {
    fn new(server: Option<ServerConfig>, peer: SocketAddr, seed: u8) -> Self {
        let mut config = EndpointConfig::default();
        config.rng_seed(Some([seed; 32]));
        let dials = server.is_none();
        Self {
            endpoint: Endpoint::new(Arc::new(config), server.map(Arc::new), true, None),
            connection: None,
            peer,
            inbox: VecDeque::new(),
            naps: None,
            dials,
            is_done: false,
            lanes: Vec::new(),
            payload: Bytes::from(vec![0; 256 * 1024]),
            buffer: Vec::new(),
        }
    }

    fn dialer(tuning: &Tuning, now: Instant) -> Self {
        let identity = Identity::generate().expect("random numbers");
        let crypto = tls::client_config(&identity, b"simulation").expect("sound");
        let crypto = QuicClientConfig::try_from(crypto).expect("TLS 1.3");
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(tuning.transport()));
        let mut side = Self::new(None, address(2), 1);
        let dialled = side
            .endpoint
            .connect(now, config, side.peer, tls::SERVER_NAME);
        side.connection = Some(dialled.expect("a sound address"));
        side
    }

    fn listener(tuning: &Tuning) -> Self {
        let identity = Identity::generate().expect("random numbers");
        let crypto = tls::server_config(&identity, b"simulation").expect("sound");
        let crypto = QuicServerConfig::try_from(crypto).expect("TLS 1.3");
        let mut config = ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(Arc::new(tuning.transport()));
        Self::new(Some(config), address(1), 2)
    }

    fn receive(&mut self, now: Instant, packet: &[u8], out: &mut Outlet<'_>) {
        self.buffer.clear();
        let data = BytesMut::from(packet);
        let event = self
            .endpoint
            .handle(now, self.peer, None, None, data, &mut self.buffer);
        match event {
            Some(DatagramEvent::ConnectionEvent(_, event)) => {
                let (_, connection) = self.connection.as_mut().expect("the endpoint knows it");
                connection.handle_event(event);
            }
            Some(DatagramEvent::NewConnection(incoming)) => {
                let accepted = self.endpoint.accept(incoming, now, &mut self.buffer, None);
                self.connection =
                    Some(accepted.unwrap_or_else(|error| panic!("{:?}", error.cause)));
            }
            Some(DatagramEvent::Response(transmit)) => {
                out.offer(&self.buffer[..transmit.size]);
            }
            None => {}
        }
    }

    fn timeout(&mut self, start: Instant, at: Duration) -> Option<Duration> {
        if let Some(naps) = self.naps.as_mut().filter(|naps| naps.until > at) {
            return Some(naps.until);
        }
        let (_, connection) = self.connection.as_mut()?;
        let due = connection.poll_timeout()?.saturating_duration_since(start);
        let ms = u64::try_from(due.as_nanos().div_ceil(1_000_000)).expect("within the test");
        Some(Duration::from_millis(ms))
    }

    /// Does all that is to be done; returns the bytes that the application got.
    fn turn(&mut self, now: Instant, out: &mut Outlet<'_>) -> u64 {
        if self
            .naps
            .as_mut()
            .is_some_and(|naps| naps.is_asleep(out.at))
        {
            return 0;
        }
        while let Some(datagram) = self.inbox.pop_front() {
            self.receive(now, &datagram, out);
        }
        self.handle_timeout(now);
        let read = if self.dials {
            self.write();
            0
        } else {
            self.read()
        };
        self.transmit(now, out);
        read
    }

    fn handle_timeout(&mut self, now: Instant) {
        let Some((_, connection)) = &mut self.connection else {
            return;
        };
        if connection.poll_timeout().is_some_and(|due| due <= now) {
            connection.handle_timeout(now);
        }
    }

    /// Fills every lane as far as QUIC takes it.
    fn write(&mut self) {
        let Some((_, connection)) = &mut self.connection else {
            return;
        };
        if connection.is_handshaking() || self.is_done {
            return;
        }
        while self.lanes.len() < LANES {
            let lane = connection
                .streams()
                .open(Dir::Uni)
                .expect("the target allows eight");
            self.lanes.push(lane);
        }
        for lane in &self.lanes {
            while connection
                .send_stream(*lane)
                .write_chunks(&mut [self.payload.clone()])
                .is_ok()
            {}
        }
    }

    /// Reads every lane as far as there is anything; returns the number of bytes.
    fn read(&mut self) -> u64 {
        let Some((_, connection)) = &mut self.connection else {
            return 0;
        };
        while let Some(lane) = connection.streams().accept(Dir::Uni) {
            self.lanes.push(lane);
        }
        let mut total = 0;
        for lane in &self.lanes {
            let mut stream = connection.recv_stream(*lane);
            let mut chunks = match stream.read(true) {
                Ok(chunks) => chunks,
                Err(ReadableError::ClosedStream | ReadableError::IllegalOrderedRead) => continue,
            };
            while let Ok(Some(chunk)) = chunks.next(usize::MAX) {
                total += chunk.bytes.len() as u64;
            }
            // Credit goes out with the next packet in any case.
            let _unused = chunks.finalize().should_transmit();
        }
        total
    }

    fn transmit(&mut self, now: Instant, out: &mut Outlet<'_>) {
        let Some((handle, connection)) = &mut self.connection else {
            return;
        };
        while let Some(event) = connection.poll_endpoint_events() {
            if let Some(event) = self.endpoint.handle_event(*handle, event) {
                connection.handle_event(event);
            }
        }
        while let Some(event) = connection.poll() {
            if let Event::ConnectionLost { reason } = event {
                panic!("the connection died: {reason}");
            }
        }
        loop {
            self.buffer.clear();
            let Some(transmit) = connection.poll_transmit(now, BATCH, &mut self.buffer) else {
                return;
            };
            let size = transmit.segment_size.unwrap_or(transmit.size);
            for datagram in self.buffer[..transmit.size].chunks(size) {
                out.offer(datagram);
            }
        }
    }
}

fn address(host: u8) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::new(10, 0, 0, host), 7117))
}
