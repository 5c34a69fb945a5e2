//! The name of a key: `SHA256:` and unpadded base64 of SHA-256 over its SubjectPublicKeyInfo.

use std::fmt;
use std::str::FromStr;

use ring::digest;

const PREFIX: &str = "SHA256:";
/// Characters of 32 bytes in unpadded base64.
const TEXT_LEN: usize = 43;
const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

/// Identifies a host's key, as OpenSSH names its own.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Fingerprint of a key given as its SubjectPublicKeyInfo.
    pub fn of_spki(spki: &[u8]) -> Self {
        let hash = digest::digest(&digest::SHA256, spki);
        let bytes = hash.as_ref().try_into().expect("SHA-256 has 32 bytes");
        Self(bytes)
    }

    /// The 32 bytes in lower case hex: a name for a file.
    pub fn to_hex(self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}", base64(&self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The text is no fingerprint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a fingerprint is \"SHA256:\" and {TEXT_LEN} characters of base64 without padding")]
pub struct FingerprintError;

impl FromStr for Fingerprint {
    type Err = FingerprintError;

    fn from_str(text: &str) -> Result<Self, FingerprintError> {
        let text = text.strip_prefix(PREFIX).ok_or(FingerprintError)?;
        let bytes = base64_32(text.as_bytes()).ok_or(FingerprintError)?;
        Ok(Self(bytes))
    }
}

fn base64(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let mut bits = 0u32;
        for position in 0..3 {
            bits = bits << 8 | u32::from(group.get(position).copied().unwrap_or(0));
        }
        // n bytes give n + 1 characters.
        for position in 0..=group.len() {
            let index = bits >> (18 - 6 * position) & 63;
            text.push(char::from(ALPHABET[index as usize]));
        }
    }
    text
}

/// Decodes exactly 32 bytes; the two unused bits at the end must be zero, so that one key has one
/// name.
fn base64_32(text: &[u8]) -> Option<[u8; 32]> {
    if text.len() != TEXT_LEN {
        return None;
    }
    let (mut bits, mut count) = (0u32, 0);
    let mut bytes = Vec::with_capacity(32);
    for character in text {
        let index = ALPHABET.iter().position(|known| known == character)?;
        bits = (bits << 6 | u32::try_from(index).ok()?) & 0xfff;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push(u8::try_from(bits >> count & 0xff).ok()?);
        }
    }
    if bits & ((1 << count) - 1) != 0 {
        return None;
    }
    bytes.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answer: SHA-256 of nothing, as `openssl dgst -sha256 -binary </dev/null | base64`
    /// prints it, without its padding.
    #[test]
    fn known_answer_reads_back() {
        let fingerprint = Fingerprint::of_spki(b"");
        let text = "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU";
        assert_eq!(fingerprint.to_string(), text);
        assert_eq!(text.parse(), Ok(fingerprint));
        assert!(fingerprint.to_hex().starts_with("e3b0c44298fc1c14"));
    }

    #[test]
    fn other_text_is_refused() {
        let good = Fingerprint::of_spki(b"key").to_string();
        for text in [
            "",
            "SHA256:",
            good.trim_start_matches("SHA256:"),
            &format!("{good}="),
            &good[..good.len() - 1],
            &good.replace("SHA256", "sha256"),
            "SHA256:47DEQpj8HBSa-/TImW+5JCeuQeRkm5NMpJWZG3hSuFU",
            "SHA256:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFV",
        ] {
            assert_eq!(text.parse::<Fingerprint>(), Err(FingerprintError), "{text}");
        }
    }
}
