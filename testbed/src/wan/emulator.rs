//! The emulator's loop: frames in, two link models, frames out.
//!
//! It sleeps until a frame comes in or one is due. While there is work it looks only once per
//! `grain`, so that at 500 Mbit/s it wakes 5 000 times a second and not 80 000; deliveries are made
//! half a grain early and half a grain late, so the mean delay is exact.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::errno::Errno;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use testbed_link::{Link, LinkParams, ParamError};

use super::control::{Answer, DATAGRAM_BYTES_MAX, Request, WanCounters};
use super::port::{ETHERNET_HEADER_BYTES, FRAME_BYTES_MAX, Port, Received};
use crate::clock;

/// Frames read from one port before the other has its turn.
const READ_BUDGET: usize = 256;

/// What the emulator is started with.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Interface on the cloud's side.
    pub site: String,
    /// Interface on the client's side.
    pub far: String,
    /// Path of the control socket to make.
    pub control: PathBuf,
    /// Parameters of both directions.
    pub link: LinkParams,
    /// Seed of all chance.
    pub seed: u64,
}

/// Runs the emulator until its process is killed. Says `ready` on stdout when it forwards.
///
/// # Errors
/// If a port or the control socket cannot be opened, or a port fails.
pub fn run(settings: &Settings) -> anyhow::Result<()> {
    let control = UnixDatagram::bind(&settings.control).context("bind the control socket")?;
    control.set_nonblocking(true)?;
    // Normal processes may be woken 50 us late by default.
    rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1))?;
    let mut emulator = Emulator::new(settings)?;
    writeln!(io::stdout(), "ready").context("say ready")?;
    loop {
        let busy = emulator.step()?;
        emulator.answer(&control)?;
        emulator.wait(&control, busy)?;
    }
}

struct Emulator {
    start: Instant,
    grain: Duration,
    site: Port,
    far: Port,
    to_client: Link<Vec<u8>>,
    to_cloud: Link<Vec<u8>>,
    buffer: Box<[u8; FRAME_BYTES_MAX]>,
    /// Emptied frames, to be filled again.
    spare: Vec<Vec<u8>>,
    interfaces: [String; 2],
    control: PathBuf,
    received_at_start: u64,
    frames_read: u64,
    send_failures: u64,
    oversize: u64,
}

/// Spare frames kept: enough for what one grain needs.
const SPARE_FRAMES_MAX: usize = 512;

impl Emulator {
    fn new(settings: &Settings) -> anyhow::Result<Self> {
        let interfaces = [settings.site.clone(), settings.far.clone()];
        let received_at_start = received_packets(&interfaces)?;
        Ok(Self {
            start: clock::now(),
            grain: grain(&settings.link),
            site: Port::open(&settings.site)?,
            far: Port::open(&settings.far)?,
            to_client: Link::new(settings.link, settings.seed)?,
            to_cloud: Link::new(settings.link, settings.seed.wrapping_add(1))?,
            buffer: Box::new([0; FRAME_BYTES_MAX]),
            spare: Vec::new(),
            interfaces,
            control: settings.control.clone(),
            received_at_start,
            frames_read: 0,
            send_failures: 0,
            oversize: 0,
        })
    }

    fn now(&self) -> Duration {
        clock::now().duration_since(self.start)
    }

    /// Delivers what is due, takes what has come. True if there was anything.
    fn step(&mut self) -> anyhow::Result<bool> {
        let read_before = self.frames_read;
        self.read()?;
        let due = self.now() + self.grain / 2;
        let mut sent = 0;
        let ways = [
            (&mut self.to_client, &mut self.far),
            (&mut self.to_cloud, &mut self.site),
        ];
        for (link, port) in ways {
            while let Some(mut frame) = link.poll(due) {
                sent += 1;
                if !port.send(&frame)? {
                    self.send_failures += 1;
                }
                if self.spare.len() < SPARE_FRAMES_MAX {
                    frame.clear();
                    self.spare.push(frame);
                }
            }
        }
        Ok(sent > 0 || self.frames_read > read_before)
    }

    fn read(&mut self) -> Result<(), Errno> {
        let now = self.now();
        let ways = [
            (&mut self.site, &mut self.to_client),
            (&mut self.far, &mut self.to_cloud),
        ];
        for (port, link) in ways {
            for _ in 0..READ_BUDGET {
                let len = match port.receive(&mut self.buffer)? {
                    Received::Empty => break,
                    Received::Frame(len) => len,
                    Received::Oversize => {
                        self.oversize += 1;
                        self.frames_read += 1;
                        continue;
                    }
                };
                self.frames_read += 1;
                let ip_bytes = ip_bytes(len);
                let mut frame = self.spare.pop().unwrap_or_default();
                frame.extend_from_slice(&self.buffer[..len]);
                link.offer(now, ip_bytes, frame);
            }
        }
        Ok(())
    }

    /// Answers at most one request, so that no client can stall the link.
    fn answer(&mut self, control: &UnixDatagram) -> anyhow::Result<()> {
        let mut text = [0; DATAGRAM_BYTES_MAX];
        let (len, from) = match control.recv_from(&mut text) {
            Ok(request) => request,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error).context("read a request"),
        };
        let error = match serde_json::from_slice::<Request>(&text[..len]) {
            Ok(request) => self.apply(&request).err().map(|error| error.to_string()),
            Err(error) => Some(format!("not a request: {error}")),
        };
        let answer = Answer {
            error,
            counters: self.counters()?,
        };
        // The client is in the same directory, which has another path in its own mount namespace.
        let name = from.as_pathname().and_then(Path::file_name);
        if let (Some(name), Some(directory)) = (name, self.control.parent()) {
            // A client that went away must not end the emulator.
            control
                .send_to(&serde_json::to_vec(&answer)?, directory.join(name))
                .ok();
        }
        Ok(())
    }

    fn apply(&mut self, request: &Request) -> anyhow::Result<()> {
        let now = self.now();
        match *request {
            Request::Counters => {}
            Request::Set {
                to_client,
                to_cloud,
            } => {
                self.set(now, to_client.try_into()?, to_cloud.try_into()?)?;
            }
            Request::Cut => {
                self.to_client.cut(now);
                self.to_cloud.cut(now);
            }
            Request::Mend => {
                self.to_client.mend();
                self.to_cloud.mend();
            }
        }
        Ok(())
    }

    fn set(
        &mut self,
        now: Duration,
        to_client: LinkParams,
        to_cloud: LinkParams,
    ) -> Result<(), ParamError> {
        self.to_client.set_params(now, to_client)?;
        self.to_cloud.set_params(now, to_cloud)?;
        self.grain = grain(&to_client).min(grain(&to_cloud));
        Ok(())
    }

    fn counters(&self) -> anyhow::Result<WanCounters> {
        let usage = nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF)?;
        let seconds =
            |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
        let received = received_packets(&self.interfaces)? - self.received_at_start;
        Ok(WanCounters {
            to_client: self.to_client.counters().into(),
            to_cloud: self.to_cloud.counters().into(),
            send_failures: self.send_failures,
            oversize: self.oversize,
            // Frames that still wait in the sockets count as dropped: exact when the link is idle.
            kernel_drops: received.saturating_sub(self.frames_read),
            cpu_s: seconds(usage.user_time()) + seconds(usage.system_time()),
            is_cut: self.to_client.is_cut(),
        })
    }

    fn wait(&self, control: &UnixDatagram, busy: bool) -> anyhow::Result<()> {
        if busy {
            // A signal may end it early, which costs nothing but one more look.
            drop(rustix::thread::nanosleep(&timespec(self.grain)));
        }
        let due = [&self.to_client, &self.to_cloud]
            .into_iter()
            .filter_map(Link::next_delivery);
        let timeout = due
            .min()
            .map(|due| timespec(due.saturating_sub(self.now() + self.grain / 2)));
        let readable = PollFlags::IN;
        let mut sources = [
            PollFd::from_borrowed_fd(self.site.as_fd(), readable),
            PollFd::from_borrowed_fd(self.far.as_fd(), readable),
            PollFd::from_borrowed_fd(control.as_fd(), readable),
        ];
        match poll(&mut sources, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error).context("wait for frames"),
        }
    }
}

fn ip_bytes(frame_bytes: usize) -> u32 {
    let ip_bytes = frame_bytes.saturating_sub(ETHERNET_HEADER_BYTES);
    u32::try_from(ip_bytes).expect("a frame is at most 1514 bytes")
}

/// How often to look while busy: a quarter of the delay, 20 to 200 us.
fn grain(link: &LinkParams) -> Duration {
    (link.delay / 4).clamp(Duration::from_micros(20), Duration::from_micros(200))
}

fn timespec(time: Duration) -> Timespec {
    Timespec::try_from(time).expect("the link's times are far below i64 seconds")
}

/// Frames that came in on the interfaces since they exist.
fn received_packets(interfaces: &[String; 2]) -> anyhow::Result<u64> {
    let table = std::fs::read_to_string("/proc/self/net/dev").context("read /proc/self/net/dev")?;
    let mut sum = 0;
    for interface in interfaces {
        let fields = table
            .lines()
            .filter_map(|line| line.trim_start().strip_prefix(interface.as_str()))
            .find_map(|rest| rest.strip_prefix(':'))
            .with_context(|| format!("no interface {interface}"))?;
        // Receive: bytes, packets, ...
        let packets = fields
            .split_whitespace()
            .nth(1)
            .context("/proc/self/net/dev is short")?;
        sum += packets
            .parse::<u64>()
            .context("/proc/self/net/dev holds no number")?;
    }
    Ok(sum)
}
