//! Where a program runs.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::host::Host;

/// A place to run programs in.
#[derive(Clone, Copy, Debug)]
pub enum Place<'a> {
    /// This machine as it is.
    Here,
    /// A host of the lab; files that both sides need are in its private folder.
    Host(&'a Host),
}

impl Place<'_> {
    /// A command that will run there, and that the kernel kills when the thread that started it
    /// ends, whatever the end was.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        match self {
            Self::Here => {
                let mut command = Command::new("setpriv");
                command.args(["--pdeathsig", "KILL", "--"]).arg(program);
                command
            }
            Self::Host(host) => host.command(program),
        }
    }

    /// Where this process finds a path of that place.
    pub fn outside(&self, path: &Path) -> PathBuf {
        match self {
            Self::Here => path.to_owned(),
            Self::Host(host) => host.outside(path),
        }
    }
}
