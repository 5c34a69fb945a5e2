//! Where a host keeps what it must not forget: its key, whom it trusts, pair secrets, journals.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use ring::rand::{SecureRandom, SystemRandom};
use transport::quic::Identity;

/// `--state-dir`, for every verb.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct StateDirArgs {
    /// Where keys, trust and journals are kept [default: /var/lib/scaleaway as root, else
    /// $XDG_STATE_HOME/scaleaway].
    #[arg(long, value_name = "DIR", global = true)]
    pub(crate) state_dir: Option<PathBuf>,
}

/// A state folder that exists and is private.
#[derive(Debug, Clone)]
pub(crate) struct StateDir(PathBuf);

impl StateDir {
    /// Finds the folder and makes it (mode 0700) when it is not there.
    pub(crate) fn open(args: &StateDirArgs) -> Result<Self> {
        let path = match &args.state_dir {
            Some(path) => path.clone(),
            None => default_path()?,
        };
        Self::at(&path)
    }

    /// The same for a folder that is known.
    pub(crate) fn at(path: &Path) -> Result<Self> {
        make_private(path)?;
        Ok(Self(path.into()))
    }

    /// The folder.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// A private folder inside, made when it is not there.
    pub(crate) fn folder(&self, name: &str) -> Result<PathBuf> {
        let path = self.0.join(name);
        make_private(&path)?;
        Ok(path)
    }

    /// This host's key, made on first use.
    pub(crate) fn identity(&self) -> Result<Identity> {
        Ok(Identity::load_or_create(&self.0.join("identity.key"))?)
    }
}

fn default_path() -> Result<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Ok("/var/lib/scaleaway".into());
    }
    // As the XDG base directory specification says: a relative path is to be ignored.
    let absolute = |name| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|p| p.is_absolute())
    };
    if let Some(folder) = absolute("XDG_STATE_HOME") {
        return Ok(folder.join("scaleaway"));
    }
    match absolute("HOME") {
        Some(home) => Ok(home.join(".local/state/scaleaway")),
        None => bail!("neither XDG_STATE_HOME nor HOME is set; name a folder with --state-dir"),
    }
}

fn make_private(path: &Path) -> Result<()> {
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("state folder {}", parent.display()))?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        Err(error) => {
            return Err(error).with_context(|| format!("state folder {}", path.display()));
        }
    }
    let found = fs::metadata(path).with_context(|| format!("state folder {}", path.display()))?;
    if !found.is_dir() {
        bail!("state folder {} is not a folder", path.display());
    }
    let mode = found.permissions().mode() & 0o777;
    if mode & 0o022 != 0 {
        // Whoever may replace files here may also replace the list of trusted keys.
        bail!(
            "state folder {0} has mode {mode:03o}, others can write it; run: chmod go-w {0}",
            path.display()
        );
    }
    Ok(())
}

/// Replaces a file (mode 0600) by a new one with these bytes: after a crash it is the old or the
/// new one, whole.
pub(crate) fn replace_file(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut random = [0u8; 8];
    SystemRandom::new()
        .fill(&mut random)
        .map_err(|ring::error::Unspecified| anyhow::anyhow!("no random numbers"))?;
    let draft = path.with_extension(format!("{:016x}.tmp", u64::from_be_bytes(random)));
    let written = write_synced(&draft, bytes).and_then(|()| fs::rename(&draft, path));
    if let Err(error) = written {
        if let Err(error) = fs::remove_file(&draft) {
            tracing::debug!(draft = %draft.display(), %error, "draft is left");
        }
        return Err(error).with_context(|| format!("writing {}", path.display()));
    }
    let folder = path.parent().context("a file has a folder")?;
    File::open(folder)
        .and_then(|folder| folder.sync_all())
        .with_context(|| format!("syncing {}", folder.display()))
}

fn write_synced(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A folder of its own for each test, removed at the end.
    #[derive(Debug)]
    pub(crate) struct Scratch(pub(crate) PathBuf);

    impl Scratch {
        pub(crate) fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("state-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).expect("the temporary folder can be written");
            Self(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).expect("the folder is ours");
        }
    }

    #[test]
    fn made_private_and_refused_when_others_can_write() {
        let scratch = Scratch::new("private");
        let path = scratch.0.join("deep/state");
        let state = StateDir::at(&path).unwrap();
        assert_eq!(
            fs::metadata(state.path()).unwrap().permissions().mode() & 0o777,
            0o700
        );
        let first = state.identity().unwrap().fingerprint();
        assert_eq!(
            StateDir::at(&path)
                .unwrap()
                .identity()
                .unwrap()
                .fingerprint(),
            first
        );
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        let error = StateDir::at(&path).unwrap_err().to_string();
        assert!(error.contains("mode 777"), "{error}");
    }

    #[test]
    fn files_are_replaced_whole_and_private() {
        let scratch = Scratch::new("replace");
        let path = scratch.0.join("file.toml");
        replace_file(&path, b"one").unwrap();
        replace_file(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(
            fs::read_dir(&scratch.0).unwrap().count(),
            1,
            "no draft is left"
        );
    }
}
