//! The lab's hosts: kept apart, joined by the link alone, and gone without a trace.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use testbed::clock;
use testbed::lab::{CLIENT_ADDRESS, Lab, LabOptions, USER_ADDRESS};
use testbed::requirement::{NETWORK, met};
use testbed_link::named;

/// Hosts have their own names, and neither can open a file of the other, by no path.
#[test]
fn hosts_cannot_open_each_others_files() -> anyhow::Result<()> {
    if !met(&NETWORK)? {
        return Ok(());
    }
    let lab = Lab::start(&options("lan-500m")?)?;
    let inside = Path::new("/run/host/secret");
    for (host, other) in [(&lab.cloud, &lab.client), (&lab.client, &lab.cloud)] {
        std::fs::write(host.outside(inside), host.name())?;
        let own = host.output(host.command("cat").arg(inside))?;
        assert_eq!(own, host.name());
        let name = host.output(&mut host.command("hostname"))?;
        assert_eq!(name.trim(), host.name());
        // The path on the machine, and the way through the holder's root.
        let on_machine = host.outside(inside);
        let by_process = format!("/proc/{}/root/run/host/secret", host.holder());
        for path in [on_machine.as_path(), Path::new(&by_process)] {
            let error = other
                .output(other.command("cat").arg(path))
                .unwrap_err()
                .to_string();
            assert!(error.contains("No such file or directory"), "{error}");
        }
        for shared in ["/dev/shm", "/tmp", "/run"] {
            let file = format!("{shared}/of-{}", host.name());
            host.output(host.command("touch").arg(&file))?;
            assert!(!Path::new(&file).exists(), "{file} is on the machine");
            other.output(other.command("ls").arg(&file)).unwrap_err();
        }
    }
    Ok(())
}

/// Cloud and user are neighbours; the client is one round trip of the link away.
#[test]
fn only_the_link_joins_client_and_cloud() -> anyhow::Result<()> {
    if !met(&NETWORK)? {
        return Ok(());
    }
    let lab = Lab::start(&options("wan-100m")?)?;
    let ping = |host: &testbed::host::Host, to: &str| -> anyhow::Result<f64> {
        let text = host.output(
            host.command("ping")
                .args(["-c", "5", "-i", "0.1", "-W", "1", "-q", to]),
        )?;
        let line = text.lines().last().unwrap_or_default();
        let mean = line.split('/').nth(4).unwrap_or_default();
        Ok(mean.parse()?)
    };
    let near = ping(&lab.cloud, USER_ADDRESS)?;
    let far = ping(&lab.cloud, CLIENT_ADDRESS)?;
    let user = ping(&lab.user, CLIENT_ADDRESS)?;
    println!("cloud-user {near} ms, cloud-client {far} ms, user-client {user} ms");
    assert!(near < 2.0, "{near}");
    assert!((49.9..52.0).contains(&far), "{far}");
    assert!((49.9..52.0).contains(&user), "{user}");
    let counters = lab.wan.counters()?;
    assert_eq!(counters.to_client.offered_packets, 10);
    assert_eq!(counters.wire_bytes(), 20 * 84);
    lab.wan.cut()?;
    assert!(ping(&lab.cloud, CLIENT_ADDRESS).is_err());
    lab.wan.mend()?;
    lab.change_client_address(true)?;
    assert!(ping(&lab.cloud, CLIENT_ADDRESS).is_err());
    let moved = ping(&lab.cloud, testbed::lab::CLIENT_ADDRESS_2)?;
    assert!((49.9..52.0).contains(&moved), "{moved}");
    Ok(())
}

/// A dropped lab leaves no process and no file.
#[test]
fn dropped_lab_is_gone() -> anyhow::Result<()> {
    if !met(&NETWORK)? {
        return Ok(());
    }
    let lab = Lab::start(&options("lan-500m")?)?;
    let (dir, holder) = (lab.dir().to_owned(), lab.cloud.holder());
    let mut sleeper = lab.cloud.command("sleep");
    let mut sleeper = lab.cloud.spawn(sleeper.arg("600").stdin(Stdio::null()))?;
    let pid = sleeper.pid()?;
    assert!(Path::new(&format!("/proc/{pid}")).exists());
    drop(lab);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert!(!Path::new(&format!("/proc/{holder}")).exists());
    assert!(!dir.exists());
    Ok(())
}

/// A lab that is killed or interrupted in the middle of its work leaves no process, no namespace
/// (they end with their processes) and no file.
#[test]
fn killed_lab_is_gone() -> anyhow::Result<()> {
    if !met(&NETWORK)? {
        return Ok(());
    }
    for signal in [Signal::KILL, Signal::INT] {
        let results = std::env::temp_dir().join(format!("lab-killed-{}", std::process::id()));
        let mut testbed = Command::new(env!("CARGO_BIN_EXE_testbed"))
            .args(["run", "link/lan-500m", "--arm", "tcp-bbr", "--resume"])
            .arg(&results)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let look = || {
            let members = members_of_labs(testbed.id());
            let at_work = members
                .iter()
                .filter(|pid| name_of(**pid) == "iperf3")
                .count()
                >= 2;
            Ok(at_work.then_some(members))
        };
        let members = clock::wait_until("the transfer", Duration::from_secs(60), look)?;
        let id = lab_id(testbed.id()).expect("a lab at work has a name");
        let dir = Path::new("/var/tmp/scaleaway-lab").join(&id);
        assert!(dir.exists() && members.len() >= 6, "{members:?}");

        let pid = i32::try_from(testbed.id())?;
        kill_process(Pid::from_raw(pid).expect("not 0"), signal)?;
        testbed.wait()?;
        clock::wait_until("the end of all", Duration::from_secs(15), || {
            let left = members
                .iter()
                .any(|pid| Path::new(&format!("/proc/{pid}")).exists());
            Ok((!left && !dir.exists()).then_some(()))
        })?;
        std::fs::remove_dir_all(&results)?;
    }
    Ok(())
}

/// What a run left that lost even its clean-up process goes with the next start.
#[test]
fn next_start_sweeps() -> anyhow::Result<()> {
    if !met(&NETWORK)? {
        return Ok(());
    }
    let dead = Path::new("/var/tmp/scaleaway-lab/dead-run");
    std::fs::create_dir_all(dead.join("cloud"))?;
    std::fs::write(dead.join("lock"), "")?;
    std::fs::write(dead.join("cloud/file"), "of a dead run")?;
    let lab = Lab::start(&options("lan-500m")?)?;
    assert!(!dead.exists() && lab.dir().exists());
    Ok(())
}

/// All processes in the network namespaces of the hosts that `testbed` holds.
fn members_of_labs(testbed: u32) -> Vec<u32> {
    let namespace = |pid: u32| std::fs::read_link(format!("/proc/{pid}/ns/net")).ok();
    let hosts: Vec<_> = holders(testbed).into_iter().filter_map(namespace).collect();
    processes()
        .into_iter()
        .filter(|pid| namespace(*pid).is_some_and(|own| hosts.contains(&own)))
        .collect()
}

fn holders(testbed: u32) -> Vec<u32> {
    let holders = children(testbed)
        .into_iter()
        .filter(|pid| name_of(*pid) == "unshare");
    holders.flat_map(children).collect()
}

fn lab_id(testbed: u32) -> Option<String> {
    let holder = holders(testbed).into_iter().next()?;
    let arguments = std::fs::read_to_string(format!("/proc/{holder}/cmdline")).ok()?;
    let (_, rest) = arguments.split_once("sclw-")?;
    Some(rest.split_once('-')?.0.to_owned())
}

fn children(pid: u32) -> Vec<u32> {
    let of_thread = |entry: std::fs::DirEntry| {
        std::fs::read_to_string(entry.path().join("children")).unwrap_or_default()
    };
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let lists: Vec<String> = threads.map(of_thread).collect();
    lists
        .iter()
        .flat_map(|list| list.split_whitespace())
        .flat_map(str::parse)
        .collect()
}

fn processes() -> Vec<u32> {
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

fn name_of(pid: u32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    name.trim_end().to_owned()
}

fn options(link: &str) -> anyhow::Result<LabOptions> {
    let mut options = LabOptions::new(named(link).expect("a named link"))?;
    options.program = env!("CARGO_BIN_EXE_testbed").into();
    Ok(options)
}
