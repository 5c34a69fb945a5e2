//! Pages that a guest gives back: hinted as free, reported as free, or in the balloon. QEMU sends
//! some of them never, and others change without a word; the guest arrives all the same, its own
//! memory whole, and the proof of memory is not fooled by what nobody owns.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::json;
use testbed::clock;
use testbed::guest::{Files, Guest, Image, Machine, Network, Place, Ram};
use testbed::pair::TestFolder;
use testbed::product::{self, Product};
use testbed::progress::Progress;
use testbed::requirement::{GUESTS, Requirement, met};

const MOVE_MAX: Duration = Duration::from_secs(90);
const BALLOON: [&str; 4] = [
    "-object",
    "iothread,id=hints",
    "-device",
    "virtio-balloon-pci,id=balloon,iothread=hints,free-page-hint=on,free-page-reporting=on",
];
/// What the guest keeps when the balloon is blown up: 132 of its 160 MiB. With less the kernel kills the load.
const KEPT_BYTES: u64 = 132 << 20;

#[test]
fn given_back_pages_of_shared_ram() -> anyhow::Result<()> {
    check("balloon-s", Ram::Shared)
}

#[test]
fn given_back_pages_of_plain_ram() -> anyhow::Result<()> {
    check("balloon-p", Ram::Plain)
}

/// The guest hints and reports free pages, and the balloon takes pages after they were announced.
fn check(name: &str, ram: Ram) -> anyhow::Result<()> {
    if !met(&GUESTS)? || !met(&[Requirement::Product])? {
        return Ok(());
    }
    let folder = TestFolder::new(name)?;
    let image = Image::ready(&Progress::silent())?;
    let files = with_balloon(&image, folder.path())?;
    let machine = Machine {
        ram,
        ..Machine::small()
    };
    let start = |place: &str, more: &[&str]| {
        let words = [&BALLOON[..], more].concat();
        let place = folder.path().join(place);
        Guest::start(
            Place::Here,
            &files,
            &machine,
            &Network::Nothing,
            &place,
            &words,
        )
    };
    let source = start("source", &[])?;
    source.wait_ready()?;
    let filled = "dd if=/dev/urandom of=/tmp/old bs=1M count=24";
    source.control()?.run(filled, MOVE_MAX)?;
    let target = start("target", &["-incoming", "defer"])?;
    let program = product::program()?;
    let installation = |name: &str| Product::new(Place::Here, &program, &folder.path().join(name));
    let (cloud, client) = (installation("cloud"), installation("client"));
    product::introduce(&cloud, &client)?;
    let port = std::net::UdpSocket::bind("127.0.0.1:0")?
        .local_addr()?
        .port();
    let address = format!("127.0.0.1:{port}");
    let words = |guest: &Guest, more: &[&str]| -> Vec<String> {
        let monitor = guest.product_monitor().display().to_string();
        let all = [&["--qmp", &monitor][..], more].concat();
        all.iter().map(|word| (*word).to_owned()).collect()
    };
    let how = words(
        &target,
        &["--listen", &address, "--paused", "--verify", "full"],
    );
    let mut receive = client.start("receive", &how, &folder.path().join("receive.log"))?;
    receive.wait_listening()?;
    let how = words(
        &source,
        &["--to", &address, "--keep-source", "--max-bandwidth", "60M"],
    );
    let mut send = cloud.start("send", &how, &folder.path().join("send.log"))?;
    clock::wait_until("the end of the first pass", MOVE_MAX, || {
        let state = source.monitor().execute("query-migrate", &json!({}))?;
        let syncs = state["ram"]["dirty-sync-count"].as_u64().unwrap_or(0);
        Ok((syncs > 1).then_some(()))
    })?;
    source.control()?.run("rm /tmp/old", MOVE_MAX)?;
    let kept = json!({"value": KEPT_BYTES});
    source.monitor().execute("balloon", &kept)?;
    clock::wait_until("the balloon", MOVE_MAX, || {
        let state = source.monitor().execute("query-balloon", &json!({}))?;
        let actual = state["actual"].as_u64().unwrap_or(u64::MAX);
        Ok((actual <= KEPT_BYTES).then_some(()))
    })?;
    // Nothing has been handed over: what was taken had been announced.
    assert!(source.is_running()?, "{}", send.output());
    let codes = (send.wait(MOVE_MAX)?, receive.wait(MOVE_MAX)?);
    assert_eq!(codes, (0, 0), "{}\n{}", send.output(), receive.output());
    target.monitor().execute("cont", &json!({}))?;
    assert_eq!(target.control()?.verify()?.errors, 0);
    Ok(())
}

/// The image's initrd with one more module: the kernel unpacks archives one after the other.
fn with_balloon(image: &Image, folder: &Path) -> anyhow::Result<Files> {
    let files = Files::from(image);
    let tree = folder.join("more/modules");
    fs::create_dir_all(&tree)?;
    let order = cpio_file(&files.initrd, "modules/order", folder)?;
    fs::write(tree.join("order"), order + "virtio_balloon\n")?;
    let release = debugfs(&files.disk, "ls -p /usr/lib/modules")?;
    let release = release
        .lines()
        .filter_map(|line| line.split('/').nth(5))
        .find(|name| name.starts_with(|first: char| first.is_ascii_digit()))
        .context("the image has no kernel modules")?
        .to_owned();
    let module = tree.join("virtio_balloon.ko");
    let from = format!("/usr/lib/modules/{release}/kernel/drivers/virtio/virtio_balloon.ko");
    debugfs(&files.disk, &format!("dump {from} {}", module.display()))?;
    ensure!(module.metadata()?.len() > 0, "{from} is empty");
    let initrd = folder.join("initrd");
    shell(
        folder,
        &format!(
            "cat {} >initrd && cd more && find . | busybox cpio -o -H newc >>../initrd",
            files.initrd.display()
        ),
    )?;
    Ok(Files { initrd, ..files })
}

fn cpio_file(archive: &Path, name: &str, folder: &Path) -> anyhow::Result<String> {
    let place = folder.join("unpacked");
    fs::create_dir_all(&place)?;
    let archive = archive.display();
    shell(&place, &format!("busybox cpio -i -d {name} <{archive}"))?;
    Ok(fs::read_to_string(place.join(name))?)
}

fn debugfs(disk: &PathBuf, request: &str) -> anyhow::Result<String> {
    let done = Command::new("debugfs")
        .args(["-R", request])
        .arg(disk)
        .output()?;
    ensure!(done.status.success(), "debugfs: {request}");
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

fn shell(folder: &Path, script: &str) -> anyhow::Result<()> {
    let done = Command::new("sh")
        .args(["-c", script])
        .current_dir(folder)
        .output()?;
    let error = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "{script}: {error}");
    Ok(())
}
