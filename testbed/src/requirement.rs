//! What a test of the lab needs of the machine, and what it says when that is not there.

use anyhow::bail;

/// Something that a machine may lack.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Requirement {
    /// Namespaces, other processes' memory.
    Root,
    /// A program in the path.
    Program(&'static str),
    /// The program under test.
    Product,
}

impl Requirement {
    fn is_met(self) -> bool {
        match self {
            Self::Root => rustix::process::geteuid().is_root(),
            Self::Program(name) => {
                let path = std::env::var_os("PATH").unwrap_or_default();
                std::env::split_paths(&path).any(|folder| folder.join(name).is_file())
            }
            Self::Product => crate::product::program().is_ok(),
        }
    }

    fn missing(self) -> String {
        match self {
            Self::Root => "it needs root".to_owned(),
            Self::Program(name) => format!("{name} is missing: run testbed/setup.sh"),
            Self::Product => "scaleaway is not built: cargo build --bin scaleaway".to_owned(),
        }
    }
}

/// What a test with guests needs.
pub const GUESTS: [Requirement; 4] = [
    Requirement::Root,
    Requirement::Program("qemu-system-x86_64"),
    Requirement::Program("mmdebstrap"),
    Requirement::Program("busybox"),
];

/// What a test of hosts and the link between them needs.
pub const NETWORK: [Requirement; 6] = [
    Requirement::Root,
    Requirement::Program("ip"),
    Requirement::Program("bridge"),
    Requirement::Program("ethtool"),
    Requirement::Program("ping"),
    Requirement::Program("iperf3"),
];

/// Whether a test can run here. If not, it says `Skipped` with the reason; and where a skip is a
/// failure (`REQUIRE_ALL=1`) it is an error.
///
/// # Errors
/// When something is missing and nothing may be.
pub fn met(requirements: &[Requirement]) -> anyhow::Result<bool> {
    let Some(missing) = requirements
        .iter()
        .find(|requirement| !requirement.is_met())
    else {
        return Ok(true);
    };
    if std::env::var_os("REQUIRE_ALL").is_some_and(|value| value == "1") {
        bail!("{}, and REQUIRE_ALL=1 allows no skip", missing.missing());
    }
    eprintln!("Skipped: {}", missing.missing());
    Ok(false)
}
