//! Where a program runs.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A place to run programs in.
#[derive(Debug)]
pub enum Place {
    /// This machine as it is.
    Here,
}

impl Place {
    /// A command that will run there.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        match self {
            Self::Here => Command::new(program),
        }
    }

    /// Where this process finds a path of that place.
    pub fn outside(&self, path: &Path) -> PathBuf {
        match self {
            Self::Here => path.to_owned(),
        }
    }
}
