//! Two QEMUs and two installations of the product on this machine, without namespaces: what tests
//! of correctness are made of.

use std::fs;
use std::net::UdpSocket;
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::clock;
use crate::guest::{Event, Guest, Image, Machine, Network, Place, State};
use crate::product::{self, Product, Running};
use crate::progress::Progress;

/// A source whose guest runs, a target that waits for it, and both ends of the product.
///
/// `cloud` and `client` are installations; either may be source.
#[derive(Debug)]
pub struct Pair {
    image: Image,
    machine: Machine,
    /// The guest runs here.
    pub source: Guest,
    /// Started with `-incoming defer`.
    pub target: Guest,
    /// The installation that the source's agent uses at first.
    pub cloud: Product<'static>,
    /// The other.
    pub client: Product<'static>,
    /// UDP port of whoever listens.
    pub port: u16,
    /// QEMUs that were replaced, whose events still count.
    retired: Vec<Vec<Event>>,
    targets: u32,
    // Last: the files go when the programs are gone.
    folder: TestFolder,
}

impl Pair {
    /// Both QEMUs from the saved state of such a machine; the installations trust each other.
    ///
    /// # Errors
    /// When a part does not start.
    pub fn new(name: &str, machine: &Machine) -> anyhow::Result<Self> {
        let (folder, silent) = (TestFolder::new(name)?, Progress::silent());
        let image = Image::ready(&silent)?;
        let state = State::ready(&image, machine, &silent)?;
        let (files, network) = ((&image).into(), Network::Nothing);
        let place = folder.path().join("source");
        let source = State::restore(state.file(), Place::Here, &files, machine, &network, &place)?;
        Self::around(source, image, machine, folder)
    }

    /// The same with a source that was just booted: for a QEMU that cannot load a saved state.
    ///
    /// # Errors
    /// When a part does not start.
    pub fn booted(name: &str, machine: &Machine) -> anyhow::Result<Self> {
        let folder = TestFolder::new(name)?;
        let image = Image::ready(&Progress::silent())?;
        let source = Guest::boot(Place::Here, &image, machine, &folder.path().join("source"))?;
        source.wait_ready()?;
        Self::around(source, image, machine, folder)
    }

    fn around(
        source: Guest,
        image: Image,
        machine: &Machine,
        folder: TestFolder,
    ) -> anyhow::Result<Self> {
        let (files, network) = ((&image).into(), Network::Nothing);
        let place = folder.path().join("target-1");
        let target = Guest::incoming(Place::Here, &files, machine, &network, &place)?;
        let program = product::program()?;
        let installation =
            |name: &str| Product::new(Place::Here, &program, &folder.path().join(name));
        let (cloud, client) = (installation("cloud-state"), installation("client-state"));
        product::introduce(&cloud, &client)?;
        let port = UdpSocket::bind("127.0.0.1:0")?.local_addr()?.port();
        Ok(Self {
            image,
            machine: machine.clone(),
            source,
            target,
            cloud,
            client,
            port,
            retired: Vec::new(),
            targets: 1,
            folder,
        })
    }

    /// Starts `receive` at the client for the target; returns once it listens.
    ///
    /// # Errors
    /// When it does not.
    pub fn receive(&self, more: &[&str]) -> anyhow::Result<Running> {
        self.receive_with(&self.client, more, &[])
    }

    /// The same for any installation, with words for its environment.
    ///
    /// # Errors
    /// When it does not listen.
    pub fn receive_with(
        &self,
        product: &Product<'_>,
        more: &[&str],
        environment: &[(&str, &str)],
    ) -> anyhow::Result<Running> {
        let listen = format!("127.0.0.1:{}", self.port);
        let mut arguments = vec!["--listen".to_owned(), listen];
        arguments.extend(self.role_arguments(&self.target, "receive", more));
        let log = self.file("receive.log");
        let mut running = product.start_with("receive", &arguments, environment, &log)?;
        running.wait_listening()?;
        Ok(running)
    }

    /// Starts `send` at the cloud for the source.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn send(&self, more: &[&str]) -> anyhow::Result<Running> {
        self.send_with(&self.cloud, more, &[])
    }

    /// The same for any installation, with words for its environment.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn send_with(
        &self,
        product: &Product<'_>,
        more: &[&str],
        environment: &[(&str, &str)],
    ) -> anyhow::Result<Running> {
        self.send_by(&self.address(), product, more, environment)
    }

    /// The same by another address, from which somebody takes packets on to [`address`](Self::address).
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn send_by(
        &self,
        address: &str,
        product: &Product<'_>,
        more: &[&str],
        environment: &[(&str, &str)],
    ) -> anyhow::Result<Running> {
        let mut arguments = vec!["--to".to_owned(), address.to_owned()];
        arguments.extend(self.role_arguments(&self.source, "send", more));
        product.start_with("send", &arguments, environment, &self.file("send.log"))
    }

    /// Where the listening end is.
    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// The report that `send` or `receive` wrote.
    ///
    /// # Errors
    /// When there is none.
    pub fn report(&self, verb: &str) -> anyhow::Result<serde_json::Value> {
        let path = self.file(&format!("{verb}-report.json"));
        let text = fs::read(&path).with_context(|| format!("no report {}", path.display()))?;
        serde_json::from_slice(&text).context("the report is no JSON")
    }

    /// Puts a fresh waiting QEMU in the target's place, as its user does after a failure.
    ///
    /// # Errors
    /// When it does not start.
    pub fn replace_target(&mut self) -> anyhow::Result<()> {
        let fresh = self.fresh_target()?;
        let old = std::mem::replace(&mut self.target, fresh);
        self.retire(old);
        Ok(())
    }

    /// Turns round: the target's guest becomes the source, its old QEMU ends, and a fresh one waits.
    ///
    /// # Errors
    /// When it does not start.
    pub fn turn_round(&mut self) -> anyhow::Result<()> {
        let fresh = self.fresh_target()?;
        let arrived = std::mem::replace(&mut self.target, fresh);
        let old = std::mem::replace(&mut self.source, arrived);
        self.retire(old);
        Ok(())
    }

    /// The most QEMUs that ran the guest at the same time, by the events of all of them.
    pub fn running_max(&self) -> usize {
        let mut all = self.retired.clone();
        all.push(self.source.monitor().events());
        all.push(self.target.monitor().events());
        running_max(&all)
    }

    /// A file in the test's folder.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn fresh_target(&mut self) -> anyhow::Result<Guest> {
        self.targets += 1;
        let place = self.folder.path().join(format!("target-{}", self.targets));
        let files = (&self.image).into();
        Guest::incoming(
            Place::Here,
            &files,
            &self.machine,
            &Network::Nothing,
            &place,
        )
    }

    fn retire(&mut self, guest: Guest) {
        let events = guest.monitor().events();
        guest.quit();
        let mut events = events;
        // A QEMU that has ended runs nothing.
        events.push(Event {
            name: "STOP".to_owned(),
            at_us: clock::epoch_us(),
        });
        self.retired.push(events);
    }

    fn role_arguments(&self, guest: &Guest, verb: &str, more: &[&str]) -> Vec<String> {
        let report = self
            .file(&format!("{verb}-report.json"))
            .display()
            .to_string();
        let monitor = guest.product_monitor().display().to_string();
        let words = ["--qmp", &monitor, "--report", &report];
        words
            .iter()
            .chain(more)
            .map(|word| (*word).to_owned())
            .collect()
    }
}

/// A folder that is gone with the test, however it ends; kept if `KEEP_TEST_FOLDERS` is set.
#[derive(Debug)]
pub struct TestFolder(PathBuf);

impl TestFolder {
    /// Makes one with a name that no other test has.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn new(name: &str) -> anyhow::Result<Self> {
        // Short: a socket's path has at most 107 bytes, and the product adds the VM's name to it.
        let short: String = name.chars().rev().take(10).collect();
        let short: String = short.chars().rev().collect();
        let unique = format!(
            "{short}-{}-{}",
            std::process::id(),
            clock::epoch_us() % 100_000
        );
        let path = std::env::temp_dir().join(unique);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TestFolder {
    fn drop(&mut self) {
        if std::env::var_os("KEEP_TEST_FOLDERS").is_none() {
            fs::remove_dir_all(&self.0).ok();
        }
    }
}

/// Most guests running at once, out of the events of each QEMU.
fn running_max(all: &[Vec<Event>]) -> usize {
    let mut changes: Vec<(u64, bool, usize)> = Vec::new();
    for (number, events) in all.iter().enumerate() {
        for event in events {
            match event.name.as_str() {
                "RESUME" => changes.push((event.at_us, true, number)),
                "STOP" | "SHUTDOWN" => changes.push((event.at_us, false, number)),
                _ => {}
            }
        }
    }
    // At the same microsecond a start counts before an end: the careful reading.
    changes.sort_by_key(|(at_us, starts, _)| (*at_us, !*starts));
    let mut running = vec![false; all.len()];
    let mut most = 0;
    for (_, starts, number) in changes {
        running[number] = starts;
        most = most.max(running.iter().filter(|runs| **runs).count());
    }
    most
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(list: &[(&str, u64)]) -> Vec<Event> {
        list.iter()
            .map(|(name, at_us)| Event {
                name: (*name).to_owned(),
                at_us: *at_us,
            })
            .collect()
    }

    /// Two that run at once are seen, one after the other are not.
    #[test]
    fn overlapping_runs_are_seen() {
        let source = events(&[("RESUME", 1), ("STOP", 10)]);
        assert_eq!(running_max(&[source.clone(), events(&[("RESUME", 11)])]), 1);
        assert_eq!(running_max(&[source.clone(), events(&[("RESUME", 9)])]), 2);
        let back = events(&[("RESUME", 1), ("STOP", 10), ("RESUME", 20)]);
        assert_eq!(
            running_max(&[back, events(&[("RESUME", 12), ("STOP", 19)])]),
            1
        );
        assert_eq!(running_max(&[]), 0);
    }
}
