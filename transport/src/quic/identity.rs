//! A host's key: Ed25519, made on first use, kept in one file, shown as a raw public key.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::Ed25519KeyPair;
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;

use super::{Fingerprint, QuicError};

/// A key file is about 85 bytes; more than this is none.
const FILE_MAX_BYTES: u64 = 4096;

/// The key pair of this host.
#[derive(Debug, Clone)]
pub struct Identity {
    key: Arc<CertifiedKey>,
    fingerprint: Fingerprint,
}

impl Identity {
    /// Reads the key from `path`; makes it there (mode 0600) when the file does not exist.
    ///
    /// Two processes that start at once end with the same key.
    ///
    /// # Errors
    /// `LocalKeyFile`, `LocalKeyExposed`, `LocalKeyInvalid`, `LocalRandom`.
    pub fn load_or_create(path: &Path) -> Result<Self, QuicError> {
        let at_path = |source| QuicError::LocalKeyFile {
            path: path.into(),
            source,
        };
        let pkcs8 = match File::open(path) {
            Ok(file) => read_private(path, &file)?,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                create(path)?;
                let file = File::open(path).map_err(at_path)?;
                read_private(path, &file)?
            }
            Err(error) => return Err(at_path(error)),
        };
        Self::from_pkcs8(&pkcs8).ok_or_else(|| QuicError::LocalKeyInvalid { path: path.into() })
    }

    /// Makes a key that is kept nowhere.
    ///
    /// # Errors
    /// `LocalRandom`.
    pub fn generate() -> Result<Self, QuicError> {
        let pkcs8 = generate_pkcs8()?;
        Ok(Self::from_pkcs8(&pkcs8).expect("a key that was just made is valid"))
    }

    /// What others know this host by.
    pub fn fingerprint(&self) -> Fingerprint {
        self.fingerprint
    }

    pub(super) fn key(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.key)
    }

    fn from_pkcs8(pkcs8: &[u8]) -> Option<Self> {
        let der = PrivatePkcs8KeyDer::from(pkcs8);
        let key = rustls::crypto::ring::sign::any_eddsa_type(&der).ok()?;
        let spki = key.public_key()?.as_ref().to_vec();
        let fingerprint = Fingerprint::of_spki(&spki);
        // RFC 7250: the only "certificate" is the SubjectPublicKeyInfo.
        let certified = CertifiedKey::new(vec![CertificateDer::from(spki)], key);
        Some(Self {
            key: Arc::new(certified),
            fingerprint,
        })
    }
}

fn generate_pkcs8() -> Result<Vec<u8>, QuicError> {
    let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new())
        .map_err(|ring::error::Unspecified| QuicError::LocalRandom)?;
    Ok(document.as_ref().to_vec())
}

fn read_private(path: &Path, file: &File) -> Result<Vec<u8>, QuicError> {
    let at_path = |source| QuicError::LocalKeyFile {
        path: path.into(),
        source,
    };
    let mode = file.metadata().map_err(at_path)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(QuicError::LocalKeyExposed {
            path: path.into(),
            mode,
        });
    }
    let mut bytes = Vec::new();
    file.take(FILE_MAX_BYTES)
        .read_to_end(&mut bytes)
        .map_err(at_path)?;
    Ok(bytes)
}

/// Writes a new key beside `path` and links it there: the file is whole or absent, and the first
/// of two creators wins.
fn create(path: &Path) -> Result<(), QuicError> {
    let at_path = |source| QuicError::LocalKeyFile {
        path: path.into(),
        source,
    };
    let pkcs8 = generate_pkcs8()?;
    let mut random = [0u8; 8];
    SystemRandom::new()
        .fill(&mut random)
        .map_err(|ring::error::Unspecified| QuicError::LocalRandom)?;
    let draft = path.with_extension(format!("{:016x}.tmp", u64::from_be_bytes(random)));
    let linked = write_synced(&draft, &pkcs8).and_then(|()| link_unless_there(&draft, path));
    let removed = fs::remove_file(&draft);
    linked.and(removed).map_err(at_path)
}

fn write_synced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

fn link_unless_there(draft: &Path, path: &Path) -> io::Result<()> {
    match fs::hard_link(draft, path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error),
        Ok(()) => {
            let folder = path
                .parent()
                .filter(|parent| !parent.as_os_str().is_empty());
            File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> std::path::PathBuf {
        let folder = std::env::temp_dir().join(format!("identity-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn made_once_and_kept_private() {
        let folder = folder("once");
        let path = folder.join("identity.key");
        let first = Identity::load_or_create(&path).unwrap();
        let again = Identity::load_or_create(&path).unwrap();
        assert_eq!(first.fingerprint(), again.fingerprint());
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_eq!(
            fs::read_dir(&folder).unwrap().count(),
            1,
            "no draft is left"
        );
        fs::remove_dir_all(&folder).unwrap();
    }

    /// Many threads make the key at once: all get the one that came first.
    #[test]
    fn concurrent_creators_agree() {
        let folder = folder("race");
        let path = folder.join("identity.key");
        let threads: Vec<_> = (0..8)
            .map(|_| {
                let path = path.clone();
                std::thread::spawn(move || Identity::load_or_create(&path).unwrap().fingerprint())
            })
            .collect();
        let mut all: Vec<_> = threads.into_iter().map(|t| t.join().unwrap()).collect();
        all.dedup();
        assert_eq!(all.len(), 1);
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn exposed_or_broken_files_are_refused() {
        let folder = folder("bad");
        let path = folder.join("identity.key");
        Identity::load_or_create(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = Identity::load_or_create(&path).unwrap_err();
        assert!(
            matches!(error, QuicError::LocalKeyExposed { mode: 0o644, .. }),
            "{error}"
        );
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        fs::write(&path, b"no key").unwrap();
        let error = Identity::load_or_create(&path).unwrap_err();
        assert!(
            matches!(error, QuicError::LocalKeyInvalid { .. }),
            "{error}"
        );
        fs::remove_dir_all(&folder).unwrap();
    }
}
