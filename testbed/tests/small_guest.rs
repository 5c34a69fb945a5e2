//! The lab's own pieces, without namespaces: a small guest, its saved state, QEMU's own migration
//! between two QEMUs, the comparison of their RAM, and the guest's check of itself.

use std::path::PathBuf;
use std::time::Duration;

use testbed::arm::native::{self, Ends, Method};
use testbed::clock;
use testbed::guest::{Guest, Image, Machine, Network, Place, Ram, State, compare};
use testbed::progress::Progress;
use testbed::requirement::{GUESTS, met};

/// A folder that is gone with the test, however it ends.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> std::io::Result<Self> {
        let path = std::env::temp_dir().join(format!("lab-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

/// Moves a small guest with QEMU's own migration and returns both sides and the folder.
fn moved(name: &str, machine: &Machine, method: Method) -> anyhow::Result<(Guest, Guest, Folder)> {
    let folder = Folder::new(name)?;
    let silent = Progress::silent();
    let image = Image::ready(&silent)?;
    let state = State::ready(&image, machine, &silent)?;
    let files = (&image).into();
    let network = Network::Nothing;
    let source = folder.0.join("source");
    let source = State::restore(
        state.file(),
        Place::Here,
        &files,
        machine,
        &network,
        &source,
    )?;
    let target = folder.0.join("target");
    let target = Guest::incoming(Place::Here, &files, machine, &network, &target)?;
    let before = source.control()?.next()?;
    assert_eq!(before.errors, 0);

    // Like -S: the target stays paused when it has loaded.
    target.monitor().execute("stop", &serde_json::json!({}))?;
    let uri = format!("unix:{}", folder.0.join("migration.sock").display());
    let ends = Ends {
        listen: &uri,
        dial: &uri,
    };
    native::start(&source, &target, method, &ends, 300)?;
    clock::wait_until("the migration", Duration::from_secs(60), || {
        native::check(&source)?;
        let loaded = target.monitor().run_state()? == "paused";
        Ok((loaded && source.monitor().migration_status()? == "completed").then_some(()))
    })?;
    Ok((source, target, folder))
}

/// A loaded target that has not run yet holds the source's RAM in every block, the guest then goes
/// on there, its counters do not fall, and every page of its working set is right.
fn check(name: &str, machine: &Machine, method: Method) -> anyhow::Result<()> {
    if !met(&GUESTS)? {
        return Ok(());
    }
    let (source, target, _folder) = moved(name, machine, method)?;
    let comparison = compare(&source, &target)?;
    assert!(comparison.pages() >= u64::from(machine.memory_mib) * 256);
    assert_eq!(comparison.differing(), 0, "{comparison:?}");

    target.monitor().execute("cont", &serde_json::json!({}))?;
    let control = target.control()?;
    let after = control.next()?;
    assert!(after.count > 0 && after.writes > 0);
    let verified = control.verify()?;
    assert_eq!((verified.errors, verified.pages), (0, 32 * 256));
    Ok(())
}

#[test]
fn plain() -> anyhow::Result<()> {
    check("plain", &Machine::small(), Method::Plain)
}

#[test]
fn multifd_zstd_with_private_ram() -> anyhow::Result<()> {
    let machine = Machine {
        ram: Ram::Plain,
        ..Machine::small()
    };
    check("multifd", &machine, Method::MultifdZstd)
}

/// The comparison finds what differs: a guest that ran on after it was copied.
#[test]
fn comparison_sees_a_difference() -> anyhow::Result<()> {
    if !met(&GUESTS)? {
        return Ok(());
    }
    let (source, target, _folder) = moved("differs", &Machine::small(), Method::Plain)?;
    target.monitor().execute("cont", &serde_json::json!({}))?;
    target.control()?.next()?;
    target.monitor().execute("stop", &serde_json::json!({}))?;
    let comparison = compare(&source, &target)?;
    assert!(comparison.differing() > 0);
    let other: Vec<_> = comparison
        .blocks
        .iter()
        .filter(|block| block.differing > 0)
        .collect();
    assert_eq!(other[0].block, "pc.ram");
    Ok(())
}
