//! What both ends keep after they moved a guest to the client: the other half of the state from
//! which every way back starts.
//!
//! The guest is moved while it is paused, by the build under test, so that both ends keep exactly
//! the state that the guest's stay goes on from. So a long stay is lived once, whatever builds of the
//! product are measured after it, and these folders belong to one build.

use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::net::UdpSocket;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::guest::{Guest, Image, Machine, Network, Place, State, lock};
use crate::host::Host;
use crate::pair::TestFolder;
use crate::product::{self, Product};
use crate::progress::Progress;
use crate::sparse;

const MOVE_MAX: Duration = Duration::from_secs(300);

/// State directories of both ends, never written again.
#[derive(Clone, Debug)]
pub struct Stores {
    cloud: PathBuf,
    client: PathBuf,
}

impl Stores {
    /// Those that this build of the product leaves behind for a guest that left in `state`: from the
    /// cache, else the guest is moved now.
    ///
    /// # Errors
    /// When the product cannot move it.
    pub fn ready(
        image: &Image,
        machine: &Machine,
        state: &State,
        progress: &Progress,
    ) -> anyhow::Result<Self> {
        let program = product::program()?;
        let of_state = format!("stores-{}-", state.key());
        let folder = image
            .folder()
            .join(format!("{of_state}{}", build(&program)?));
        let _lock = lock(image.folder(), "stores.lock")?;
        if !folder.exists() {
            progress.step("moving the guest to the client once, for what both ends keep of it");
            remove_others(image.folder(), &of_state)?;
            let part = folder.with_extension("part");
            fs::remove_dir_all(&part).ok();
            fs::create_dir_all(&part)?;
            move_once(image, machine, state, &program, &part)?;
            fs::rename(&part, &folder).context("cannot put the stores in their place")?;
        }
        Ok(Self {
            cloud: folder.join("cloud"),
            client: folder.join("client"),
        })
    }

    /// Gives both hosts their own copy, at `path` as they see it.
    ///
    /// # Errors
    /// When they cannot be copied.
    pub fn give(&self, cloud: &Host, client: &Host, path: &Path) -> anyhow::Result<()> {
        sparse::copy(&self.cloud, &cloud.outside(path))?;
        sparse::copy(&self.client, &client.outside(path))
    }
}

/// Names a build of the product by its bytes.
fn build(program: &Path) -> anyhow::Result<String> {
    let bytes = fs::read(program).with_context(|| format!("cannot read {}", program.display()))?;
    let mut hasher = DefaultHasher::new();
    hasher.write(&bytes);
    Ok(format!("{:016x}", hasher.finish()))
}

/// Other builds' stores of the same state: each is as large as the guest.
fn remove_others(folder: &Path, of_state: &str) -> anyhow::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(of_state) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

fn move_once(
    image: &Image,
    machine: &Machine,
    state: &State,
    program: &Path,
    to: &Path,
) -> anyhow::Result<()> {
    // Sockets are made in it, whose paths must be short.
    let work = TestFolder::new("stores")?;
    let (files, network, at) = (image.into(), Network::Nothing, |name| {
        work.path().join(name)
    });
    let place = Place::Here;
    let source = State::restore_paused(
        state.file(),
        place,
        &files,
        machine,
        &network,
        &at("source"),
    )?;
    let target = Guest::incoming(place, &files, machine, &network, &at("target"))?;
    let cloud = Product::new(place, program, &at("cloud"));
    let client = Product::new(place, program, &at("client"));
    product::introduce(&cloud, &client)?;
    let address = UdpSocket::bind("127.0.0.1:0")?.local_addr()?.to_string();
    let arguments = |verb: &[&str], guest: &Guest| -> Vec<String> {
        let monitor = guest.product_monitor().display().to_string();
        let words = verb.iter().map(|word| (*word).to_owned());
        words.chain(["--qmp".to_owned(), monitor]).collect()
    };
    let receiving = arguments(&["--listen", &address, "--peer", "cloud"], &target);
    let mut receive = client.start("receive", &receiving, &at("receive.log"))?;
    receive.wait_listening()?;
    let sending = arguments(&["--to", &address, "--peer", "client"], &source);
    let mut send = cloud.start("send", &sending, &at("send.log"))?;
    for running in [&mut send, &mut receive] {
        let code = running.wait(MOVE_MAX)?;
        ensure!(code == 0, "it ended with {code}:\n{}", running.output());
    }
    ensure!(
        target.monitor().run_state()? == "paused",
        "a guest that was moved while it was paused runs"
    );
    for name in ["cloud", "client"] {
        sparse::copy(&at(name), &to.join(name))?;
    }
    Ok(())
}
