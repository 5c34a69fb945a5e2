//! Whom this host trusts, and the secret that it shares with each.
//!
//! `STATE_DIR/trust.toml` lists names, fingerprints and addresses; `STATE_DIR/secrets/HEX` holds
//! the pair's 32 random bytes, which key the page hashes. A key is trusted when it is in the list,
//! or when the operator named its fingerprint on the command line.

use std::fs;
use std::io::ErrorKind;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use transport::quic::Fingerprint;

use crate::state_dir::{StateDir, replace_file};

/// Most peers of one host, and the longest name: bounds for a file that may be edited by hand.
const PEERS_MAX: usize = 10_000;
const NAME_MAX_BYTES: usize = 64;

/// Secret of a pair of hosts.
pub(crate) type PairSecret = [u8; 32];

/// A host that is trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Peer {
    /// The operator's name for it; for a key that was named on the command line, its fingerprint.
    pub(crate) name: String,
    /// Its key.
    pub(crate) fingerprint: Fingerprint,
    /// Where it listens, when known.
    pub(crate) address: Option<String>,
}

/// Which peers a verb lets in: `--peer`, checked against the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Expected {
    /// Any that is in the list.
    AnyTrusted,
    /// Only this one.
    Only(Peer),
}

/// The list, and the folder of secrets.
#[derive(Debug)]
pub(crate) struct Trust {
    file: PathBuf,
    secrets: PathBuf,
    peers: Vec<Peer>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct TrustFile {
    #[serde(default, rename = "peer")]
    peers: Vec<PeerEntry>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PeerEntry {
    name: String,
    fingerprint: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    address: Option<String>,
}

impl Trust {
    /// Reads the list; an absent file is an empty list.
    pub(crate) fn load(state: &StateDir) -> Result<Self> {
        let file = state.path().join("trust.toml");
        let text = match fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).with_context(|| format!("reading {}", file.display())),
        };
        let listed: TrustFile =
            toml::from_str(&text).with_context(|| format!("reading {}", file.display()))?;
        let mut trust = Self {
            file,
            secrets: state.folder("secrets")?,
            peers: Vec::new(),
        };
        for entry in listed.peers {
            let fingerprint = entry.fingerprint.parse();
            let fingerprint = fingerprint
                .with_context(|| format!("peer \"{}\" in the trust file", entry.name))?;
            trust.insert(Peer {
                name: entry.name,
                fingerprint,
                address: entry.address,
            })?;
        }
        Ok(trust)
    }

    /// Adds a peer and writes the list. The same name with the same key only changes the address.
    pub(crate) fn add(&mut self, peer: Peer) -> Result<()> {
        self.peers
            .retain(|old| (&old.name, old.fingerprint) != (&peer.name, peer.fingerprint));
        self.insert(peer)?;
        self.save()
    }

    /// Removes a peer with the pair's secret, and writes the list. Its old checkpoints can no
    /// longer be referred to, by either side.
    pub(crate) fn remove(&mut self, name: &str) -> Result<Peer> {
        let Some(place) = self.peers.iter().position(|peer| peer.name == name) else {
            bail!("no peer is named \"{name}\"; scaleaway trust list shows them");
        };
        let peer = self.peers.remove(place);
        self.save()?;
        match fs::remove_file(self.secret_path(peer.fingerprint)) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).context("removing the pair's secret");
            }
            Ok(()) | Err(_) => {}
        }
        Ok(peer)
    }

    /// All peers by name.
    pub(crate) fn peers(&self) -> &[Peer] {
        &self.peers
    }

    /// What `--peer NAME|FINGERPRINT` stands for; `None` is any peer of the list.
    pub(crate) fn expect(&self, peer: Option<&str>) -> Result<Expected> {
        let Some(text) = peer else {
            return Ok(Expected::AnyTrusted);
        };
        if let Ok(fingerprint) = text.parse() {
            // The operator's own word is trust enough, for this one run.
            let named = Peer {
                name: text.into(),
                fingerprint,
                address: None,
            };
            return Ok(Expected::Only(
                self.find(fingerprint).cloned().unwrap_or(named),
            ));
        }
        match self.peers.iter().find(|known| known.name == text) {
            Some(known) => Ok(Expected::Only(known.clone())),
            None => bail!(
                "\"{text}\" is no trusted peer; run here: scaleaway trust add {text} FINGERPRINT \
                 (the other host's `scaleaway identity` prints its fingerprint)"
            ),
        }
    }

    /// Decides about a key that has proved itself.
    ///
    /// # Errors
    /// A refusal, for [`Connection::refuse`](transport::quic::Connection::refuse) and for the
    /// operator: it says how to trust the key.
    pub(crate) fn admit(&self, expected: &Expected, key: Fingerprint) -> Result<Peer, Refusal> {
        match expected {
            Expected::Only(peer) if peer.fingerprint == key => Ok(peer.clone()),
            Expected::Only(peer) => Err(Refusal::Another {
                key,
                wanted: peer.name.clone(),
                known: self.name_of(key),
            }),
            Expected::AnyTrusted => self.find(key).cloned().ok_or(Refusal::Unknown { key }),
        }
    }

    /// The pair's secret, if this host holds one.
    pub(crate) fn secret(&self, peer: Fingerprint) -> Result<Option<PairSecret>> {
        let path = self.secret_path(peer);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        // A damaged secret is a lost one: the two sides make a new one.
        let secret = PairSecret::try_from(bytes.as_slice()).ok();
        if secret.is_none() {
            tracing::warn!(path = %path.display(), "pair secret has a wrong length, a new one is made");
        }
        Ok(secret)
    }

    /// Keeps the pair's secret, instead of any older one.
    pub(crate) fn keep_secret(&self, peer: Fingerprint, secret: &PairSecret) -> Result<()> {
        replace_file(&self.secret_path(peer), secret)
    }

    fn find(&self, key: Fingerprint) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.fingerprint == key)
    }

    fn name_of(&self, key: Fingerprint) -> Option<String> {
        self.find(key).map(|peer| peer.name.clone())
    }

    fn secret_path(&self, peer: Fingerprint) -> PathBuf {
        self.secrets.join(peer.to_hex())
    }

    /// One name a key and one key a name, so that a lookup by either has one answer.
    fn insert(&mut self, peer: Peer) -> Result<()> {
        check_name(&peer.name)?;
        if let Some(known) = self.peers.iter().find(|known| known.name == peer.name) {
            bail!(
                "\"{0}\" is already {1}; run first: scaleaway trust remove {0}",
                known.name,
                known.fingerprint
            );
        }
        if let Some(known) = self.find(peer.fingerprint) {
            bail!(
                "{} is already trusted as \"{}\"",
                peer.fingerprint,
                known.name
            );
        }
        if self.peers.len() >= PEERS_MAX {
            bail!("more than {PEERS_MAX} peers");
        }
        let place = self.peers.partition_point(|known| known.name < peer.name);
        self.peers.insert(place, peer);
        Ok(())
    }

    fn save(&self) -> Result<()> {
        let entry = |peer: &Peer| PeerEntry {
            name: peer.name.clone(),
            fingerprint: peer.fingerprint.to_string(),
            address: peer.address.clone(),
        };
        let file = TrustFile {
            peers: self.peers.iter().map(entry).collect(),
        };
        let text = toml::to_string(&file).context("writing the trust file")?;
        replace_file(&self.file, text.as_bytes())
    }
}

/// Names stand in shell commands, logs and messages to the other host.
fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let first = name.chars().next();
    if name.len() > NAME_MAX_BYTES
        || !name.chars().all(plain)
        || first.is_none_or(|first| !first.is_ascii_alphanumeric())
    {
        bail!(
            "a peer's name has 1 to {NAME_MAX_BYTES} of a-z, A-Z, 0-9, -, _, . and begins with a letter or digit"
        );
    }
    Ok(())
}

/// Why a key was not let in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// It is not in the list.
    #[error(
        "this host does not trust {key}; if that key is your peer's, run here: \
         scaleaway trust add NAME {key}"
    )]
    Unknown {
        /// The key that proved itself.
        key: Fingerprint,
    },
    /// `--peer` asked for another one.
    #[error(
        "this host waits for {wanted}, and {key} is {}",
        known.as_deref().unwrap_or("not known here")
    )]
    Another {
        /// The key that proved itself.
        key: Fingerprint,
        /// Name of the peer that was asked for.
        wanted: String,
        /// Name of the peer that the key belongs to.
        known: Option<String>,
    },
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state_dir::tests::Scratch;

    fn key(seed: &str) -> Fingerprint {
        Fingerprint::of_spki(seed.as_bytes())
    }

    fn peer(name: &str) -> Peer {
        Peer {
            name: name.into(),
            fingerprint: key(name),
            address: None,
        }
    }

    fn trust(name: &str) -> (Scratch, StateDir, Trust) {
        let scratch = Scratch::new(name);
        let state = StateDir::at(&scratch.0.join("state")).expect("can be made");
        let trust = Trust::load(&state).expect("an absent file is an empty list");
        (scratch, state, trust)
    }

    #[test]
    fn the_list_is_kept_sorted_and_reads_back() {
        let (_scratch, state, mut trust) = trust("list");
        trust.add(peer("laptop")).unwrap();
        let with_address = Peer {
            address: Some("cloud.example:7117".into()),
            ..peer("cloud")
        };
        trust.add(with_address.clone()).unwrap();
        let again = Trust::load(&state).unwrap();
        assert_eq!(again.peers(), [with_address, peer("laptop")]);
    }

    #[test]
    fn names_and_keys_are_unique_and_plain() {
        let (_scratch, _state, mut trust) = trust("unique");
        trust.add(peer("one")).unwrap();
        let moved = Peer {
            address: Some("10.0.0.1:7117".into()),
            ..peer("one")
        };
        trust.add(moved.clone()).unwrap();
        assert_eq!(trust.peers(), [moved]);
        let other_key = Peer {
            name: "one".into(),
            ..peer("two")
        };
        assert!(
            trust
                .add(other_key)
                .unwrap_err()
                .to_string()
                .contains("trust remove one")
        );
        let other_name = Peer {
            name: "two".into(),
            ..peer("one")
        };
        assert!(
            trust
                .add(other_name)
                .unwrap_err()
                .to_string()
                .contains("already trusted as")
        );
        for name in ["", "-x", "a b", "a\n", "é", &"x".repeat(65)] {
            assert!(
                trust
                    .add(Peer {
                        name: name.into(),
                        ..peer("n")
                    })
                    .is_err(),
                "{name:?}"
            );
        }
    }

    /// The refusal holds the command that ends it, with the real fingerprint.
    #[test]
    fn keys_are_admitted_by_list_name_or_fingerprint() {
        let (_scratch, _state, mut trust) = trust("admit");
        trust.add(peer("cloud")).unwrap();
        trust.add(peer("other")).unwrap();
        let any = trust.expect(None).unwrap();
        assert_eq!(trust.admit(&any, key("cloud")), Ok(peer("cloud")));
        let refusal = trust.admit(&any, key("stranger")).unwrap_err();
        assert_eq!(
            refusal,
            Refusal::Unknown {
                key: key("stranger")
            }
        );
        assert!(
            refusal
                .to_string()
                .ends_with(&format!("trust add NAME {}", key("stranger")))
        );

        let cloud = trust.expect(Some("cloud")).unwrap();
        assert_eq!(trust.admit(&cloud, key("cloud")), Ok(peer("cloud")));
        let known = Some("other".to_owned());
        let expected = Refusal::Another {
            key: key("other"),
            wanted: "cloud".into(),
            known,
        };
        assert_eq!(trust.admit(&cloud, key("other")), Err(expected));

        let literal = key("stranger").to_string();
        let named = trust.expect(Some(&literal)).unwrap();
        assert_eq!(trust.admit(&named, key("stranger")).unwrap().name, literal);
        assert!(
            trust
                .expect(Some("nobody"))
                .unwrap_err()
                .to_string()
                .contains("trust add nobody")
        );
    }

    #[test]
    fn secrets_are_private_and_go_with_their_peer() {
        let (_scratch, state, mut trust) = trust("secrets");
        trust.add(peer("cloud")).unwrap();
        assert_eq!(trust.secret(key("cloud")).unwrap(), None);
        trust.keep_secret(key("cloud"), &[7; 32]).unwrap();
        assert_eq!(trust.secret(key("cloud")).unwrap(), Some([7; 32]));
        let path = state.path().join("secrets").join(key("cloud").to_hex());
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        fs::write(&path, b"short").unwrap();
        assert_eq!(trust.secret(key("cloud")).unwrap(), None);
        trust.remove("cloud").unwrap();
        assert!(!path.exists());
        assert!(trust.remove("cloud").is_err());
    }

    #[test]
    fn a_file_that_says_more_than_it_should_is_refused() {
        let (_scratch, state, _trust) = trust("file");
        let entry = format!("[[peer]]\nname = \"a\"\nfingerprint = \"{}\"\n", key("a"));
        for text in [
            "[[peer]]\nname = \"a\"\nfingerprint = \"SHA256:x\"\n".to_owned(),
            format!("{entry}{entry}"),
            format!("{entry}colour = 1\n"),
        ] {
            fs::write(state.path().join("trust.toml"), text).unwrap();
            assert!(Trust::load(&state).is_err());
        }
    }
}
