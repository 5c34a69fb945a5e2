//! TLS 1.3 with raw public keys (RFC 7250) both ways.
//!
//! TLS proves that the peer holds the key that it shows, for any Ed25519 key; whether that key is
//! trusted is the program's decision right after the handshake, so that a refusal can carry words.
//! No certificates, names or dates. Sessions are never resumed: a resumed one would not show the
//! key again, and a key that is no longer trusted must not come back by a ticket.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{CryptoProvider, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, Error};
use rustls::{ClientConfig, PeerIncompatible, ServerConfig, SignatureScheme};

use super::{Identity, QuicError};

/// SubjectPublicKeyInfo of an Ed25519 key up to its 32 bytes.
//= RFC 8410, section 4 and the example of section 10.1
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 3, 0x21, 0];
const SPKI_LEN: usize = SPKI_PREFIX.len() + 32;

/// Name that is put where TLS wants one; it is never checked.
pub(super) const SERVER_NAME: &str = "scaleaway";

pub(super) fn client_config(identity: &Identity, alpn: &[u8]) -> Result<ClientConfig, QuicError> {
    let keys = Arc::new(AnyKey::new());
    let mut config = ClientConfig::builder_with_provider(Arc::clone(&keys.provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(QuicError::LocalTls)?
        .dangerous()
        .with_custom_certificate_verifier(keys)
        .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(
            identity.key(),
        )));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Ok(config)
}

pub(super) fn server_config(identity: &Identity, alpn: &[u8]) -> Result<ServerConfig, QuicError> {
    let keys = Arc::new(AnyKey::new());
    let mut config = ServerConfig::builder_with_provider(Arc::clone(&keys.provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(QuicError::LocalTls)?
        .with_client_cert_verifier(keys)
        .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(
            identity.key(),
        )));
    config.alpn_protocols = vec![alpn.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Accepts every Ed25519 key whose owner signs the handshake with it.
#[derive(Debug)]
struct AnyKey {
    provider: Arc<CryptoProvider>,
}

impl AnyKey {
    fn new() -> Self {
        Self {
            provider: Arc::new(rustls::crypto::ring::default_provider()),
        }
    }

    fn check_form(spki: &CertificateDer<'_>, more: &[CertificateDer<'_>]) -> Result<(), Error> {
        let ed25519 = spki.len() == SPKI_LEN && spki.starts_with(&SPKI_PREFIX);
        if ed25519 && more.is_empty() {
            Ok(())
        } else {
            Err(Error::InvalidCertificate(CertificateError::BadEncoding))
        }
    }

    fn check_signature(
        &self,
        message: &[u8],
        spki: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature_with_raw_key(
            message,
            &SubjectPublicKeyInfoDer::from(spki.as_ref()),
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }
}

fn no_tls12() -> Error {
    Error::PeerIncompatible(PeerIncompatible::Tls12NotOffered)
}

impl ServerCertVerifier for AnyKey {
    fn verify_server_cert(
        &self,
        spki: &CertificateDer<'_>,
        more: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        Self::check_form(spki, more).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _spki: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        spki: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, spki, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for AnyKey {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        spki: &CertificateDer<'_>,
        more: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Self::check_form(spki, more).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _spki: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        spki: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, spki, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only the one form of key passes: other algorithms, X.509 and chains do not.
    #[test]
    fn only_one_raw_ed25519_key_is_taken() {
        let identity = Identity::generate().unwrap();
        let good = identity.key().cert[0].clone();
        let bad = Err(Error::InvalidCertificate(CertificateError::BadEncoding));
        assert_eq!(AnyKey::check_form(&good, &[]), Ok(()));
        assert_eq!(AnyKey::check_form(&good, std::slice::from_ref(&good)), bad);
        assert_eq!(
            AnyKey::check_form(&CertificateDer::from(vec![0x30; SPKI_LEN]), &[]),
            bad
        );
        assert_eq!(
            AnyKey::check_form(&CertificateDer::from(SPKI_PREFIX.to_vec()), &[]),
            bad
        );
    }
}
