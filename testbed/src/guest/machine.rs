//! What a guest is made of, and QEMU's command line for it.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::image::Image;

/// The guest's UUID: what the product knows the VM by.
pub const GUEST_UUID: &str = "5ca1ea3a-0000-4000-8000-000000000001";
/// The guest's card.
pub const GUEST_MAC: &str = "52:54:00:5c:a1:10";
/// The guest's address on the overlay.
pub const GUEST_ADDRESS: &str = "10.10.0.10/24";
/// What fits into the overlay on a link of 1500 bytes.
pub const MTU: u32 = 1450;

/// No offloads: the card's features are part of the state, and so the state does not depend on
/// what kind of network it was saved on.
const CARD: &str = "virtio-net-pci,netdev=n0,csum=off,gso=off,host_tso4=off,host_tso6=off,\
    host_ecn=off,host_ufo=off,guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,\
    guest_ufo=off";

/// Where guest RAM comes from.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Ram {
    /// A memfd that other processes can map.
    #[default]
    Shared,
    /// Private anonymous memory.
    Plain,
}

/// What the program inside does; the words of `testbed/guest/load/main.rs`.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Load {
    /// Working set in MiB.
    pub working_set_mib: u32,
    /// Pages written a second; 1953 is 8 MB/s.
    pub writes_per_s: u32,
    /// Pages checked a second by the endless sweep.
    #[serde(default = "default_checks")]
    pub checks_per_s: u32,
    /// Share of random bytes in a page.
    #[serde(default = "default_entropy")]
    pub entropy_percent: u32,
    /// `random`, `hot` or `sequential`.
    #[serde(default = "default_pattern")]
    pub pattern: String,
}

fn default_checks() -> u32 {
    2000
}

fn default_entropy() -> u32 {
    50
}

fn default_pattern() -> String {
    "random".to_owned()
}

impl Load {
    fn words(&self) -> String {
        format!(
            "ws={},rate={},verify={},entropy={},pattern={}",
            self.working_set_mib,
            self.writes_per_s,
            self.checks_per_s,
            self.entropy_percent,
            self.pattern
        )
    }
}

/// One guest's hardware and work. The same value gives the same machine at source and target.
#[derive(Clone, Debug, Deserialize, Eq, Hash, PartialEq, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// RAM in MiB.
    pub memory_mib: u32,
    /// Debian on a disk; else the initrd is all there is.
    pub debian: bool,
    /// Where RAM comes from.
    #[serde(default)]
    pub ram: Ram,
    /// A virtio-mem device: its early section comes before the first page of a migration.
    #[serde(default)]
    pub virtio_mem: bool,
    /// What the program inside does.
    pub load: Load,
    /// Redis with (keys, bytes each).
    #[serde(default)]
    pub redis: Option<(u32, u32)>,
    /// QEMU's program.
    #[serde(default = "default_qemu")]
    pub qemu: PathBuf,
}

fn default_qemu() -> PathBuf {
    PathBuf::from("qemu-system-x86_64")
}

impl Machine {
    /// A guest that boots from the initrd in two to three seconds, for tests of correctness.
    pub fn small() -> Self {
        Self {
            memory_mib: 160,
            debian: false,
            ram: Ram::Shared,
            virtio_mem: false,
            load: Load {
                working_set_mib: 32,
                writes_per_s: 500,
                checks_per_s: 2000,
                entropy_percent: 50,
                pattern: default_pattern(),
            },
            redis: None,
            qemu: default_qemu(),
        }
    }

    /// The guest of the demo: Debian with 1 GiB that writes 8 MB/s into 256 MiB.
    pub fn demo() -> Self {
        let load = Load {
            working_set_mib: 256,
            writes_per_s: 1953,
            ..Self::small().load
        };
        Self {
            memory_mib: 1024,
            debian: true,
            load,
            ..Self::small()
        }
    }

    /// Kernel command line.
    fn kernel_words(&self) -> String {
        let root = if self.debian { "root=/dev/vda " } else { "" };
        let redis = match self.redis {
            Some((keys, bytes)) => format!(" lab.redis={keys},{bytes}"),
            None => String::new(),
        };
        format!(
            "console=ttyS0 {root}quiet panic=1 lab.ip={GUEST_ADDRESS} lab.mtu={MTU} lab.load={}{redis}",
            self.load.words()
        )
    }

    /// QEMU's arguments. `files` is a folder that the guest's host sees.
    pub(crate) fn arguments(&self, image: &Files, network: &Network, files: &Path) -> Vec<String> {
        let memory = self.memory_mib;
        let backend = match self.ram {
            Ram::Shared => format!("memory-backend-memfd,id=pc.ram,size={memory}M,share=on"),
            Ram::Plain => format!("memory-backend-ram,id=pc.ram,size={memory}M"),
        };
        let netdev = match network {
            Network::Nothing => "hubport,id=n0,hubid=0".to_owned(),
            Network::Tap(name) => {
                format!("tap,id=n0,ifname={name},script=no,downscript=no,vnet_hdr=off")
            }
        };
        let file = |name: &str| files.join(name).display().to_string();
        let mut arguments: Vec<String> = Vec::new();
        let mut add = |name: &str, value: String| arguments.extend([name.to_owned(), value]);
        // The migration's thread is known by its name, for its CPU time.
        add("-name", "debug-threads=on".to_owned());
        add("-M", "q35,memory-backend=pc.ram".to_owned());
        add("-object", backend);
        if self.virtio_mem {
            add("-m", format!("{memory}M,maxmem=1G"));
            add("-object", "memory-backend-ram,id=more,size=128M".to_owned());
            add(
                "-device",
                "virtio-mem-pci,memdev=more,requested-size=0".to_owned(),
            );
        } else {
            add("-m", format!("{memory}M"));
        }
        add("-accel", "tcg".to_owned());
        add("-cpu", "max".to_owned());
        add("-smp", "1".to_owned());
        add("-uuid", GUEST_UUID.to_owned());
        add("-display", "none".to_owned());
        add("-kernel", image.kernel.display().to_string());
        add("-initrd", image.initrd.display().to_string());
        add("-append", self.kernel_words());
        if self.debian {
            let disk = image.disk.display();
            add(
                "-drive",
                format!("if=none,id=d0,file={disk},format=raw,readonly=on"),
            );
            add("-device", "virtio-blk-pci,drive=d0".to_owned());
        }
        add("-netdev", netdev);
        add("-device", format!("{CARD},mac={GUEST_MAC}"));
        add("-serial", format!("file:{}", file("console.log")));
        add(
            "-chardev",
            format!(
                "socket,id=c1,path={},server=on,wait=off",
                file("control.sock")
            ),
        );
        add("-serial", "chardev:c1".to_owned());
        add(
            "-qmp",
            format!("unix:{},server=on,wait=off", file("lab.sock")),
        );
        add(
            "-qmp",
            format!("unix:{},server=on,wait=off", file("product.sock")),
        );
        arguments.push("-nodefaults".to_owned());
        arguments
    }
}

/// Where a guest's host finds kernel, initrd and disk.
#[derive(Clone, Debug)]
pub struct Files {
    /// Debian's kernel.
    pub kernel: PathBuf,
    /// The initrd.
    pub initrd: PathBuf,
    /// The root disk.
    pub disk: PathBuf,
}

impl From<&Image> for Files {
    fn from(image: &Image) -> Self {
        Self {
            kernel: image.kernel(),
            initrd: image.initrd(),
            disk: image.disk(),
        }
    }
}

/// What the guest's card is plugged into.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Network {
    /// A card without a cable.
    Nothing,
    /// A tap that is there already.
    Tap(String),
}
