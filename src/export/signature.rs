//! `manifest.json.sig`: an Ed25519 signature (RFC 8032) over the very bytes of `manifest.json`, which holds the SHA-256 of all the
//! rest. Keys are those that OpenSSL makes:
//!
//! ```text
//! openssl genpkey -algorithm ed25519 -out key.pem          to sign with
//! openssl pkey -in key.pem -pubout -out public.pem         to check with
//! openssl pkeyutl -verify -pubin -inkey public.pem -rawin -in manifest.json -sigfile SIGNATURE
//! ```
//!
//! The file is the signature's 64 bytes in base64, so the last line wants it through `base64 -d` first.

use std::path::{Path, PathBuf};

use base64::prelude::{BASE64_STANDARD, Engine};
use ed25519_dalek::pkcs8::{DecodePrivateKey, DecodePublicKey};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};

use super::manifest::MANIFEST;
use crate::weights::{self, writer};
use crate::{Error, Fault, Result};

/// The file's name, beside the manifest.
pub const SIGNATURE: &str = "manifest.json.sig";
/// Longest key file that is read.
const MOST_BYTES: u64 = 64 << 10;

/// A key to sign with.
pub struct Key(SigningKey);

impl Key {
    /// Reads a private key: PKCS#8 in PEM.
    ///
    /// # Errors
    /// [`Error::Output`], without a word of what the file holds.
    pub fn read(path: &Path) -> Result<Self> {
        let text = text(path).map_err(Error::Output)?;
        let key = SigningKey::from_pkcs8_pem(&text).map_err(|_| {
            let fault = Fault::at(path, "is no private key of Ed25519 (PKCS#8 in PEM, without a password)");
            Error::Output(fault.hint("make one: openssl genpkey -algorithm ed25519 -out key.pem"))
        })?;
        Ok(Self(key))
    }
}

/// Signs the manifest in `folder`.
///
/// # Errors
/// [`Error::Output`]: there is no manifest, or the signature cannot be written.
pub fn sign(folder: &Path, key: &Key) -> Result<PathBuf> {
    let manifest = folder.join(MANIFEST);
    let bytes = std::fs::read(&manifest).map_err(|error| Error::Output(Fault::at(&manifest, error)))?;
    let signature = key.0.sign(&bytes);
    let path = folder.join(SIGNATURE);
    writer::write_file(&path, format!("{}\n", BASE64_STANDARD.encode(signature.to_bytes())).as_bytes())?;
    Ok(path)
}

/// Checks the signature of the manifest in `folder` with the public key in the file `key`.
///
/// # Errors
/// [`Error::Mismatch`]: it is of another key, or the manifest was changed since; [`Error::Model`]: no signature, no key, or neither
/// is one.
pub fn check(folder: &Path, key: &Path) -> Result<()> {
    let public = VerifyingKey::from_public_key_pem(&text(key).map_err(Error::Model)?).map_err(|_| {
        let fault = Fault::at(key, "is no public key of Ed25519 (PEM)");
        Error::Model(fault.hint("make it of the private one: openssl pkey -in key.pem -pubout -out public.pem"))
    })?;
    let path = folder.join(SIGNATURE);
    if !path.exists() {
        let fault = Fault::at(folder, format!("holds no {SIGNATURE}: it is not signed"));
        return Err(Error::Model(fault.hint("sign what is exported: --sign KEY")));
    }
    let signature = text(&path).ok().and_then(|text| BASE64_STANDARD.decode(text.trim()).ok());
    let signature = signature.and_then(|bytes| Signature::from_slice(&bytes).ok());
    let signature =
        signature.ok_or_else(|| Error::Model(Fault::at(&path, "holds no signature (64 bytes in base64)")))?;
    let manifest = folder.join(MANIFEST);
    let (_, bytes) = weights::json_object(&manifest, 64 << 20)?;
    // Strictly: a key of small order would sign anything.
    public.verify_strict(&bytes, &signature).map_err(|_| {
        let what = format!("does not sign {MANIFEST} as it is now with the key {}", key.display());
        Error::Mismatch(Fault::at(&path, what).hint("the manifest was changed, or it was signed with another key"))
    })
}

fn text(path: &Path) -> Result<String, Fault> {
    let fault = |what: String| Fault::at(path, what);
    let metadata = path.metadata().map_err(|error| fault(format!("cannot be read: {error}")))?;
    if !metadata.is_file() || metadata.len() > MOST_BYTES {
        return Err(fault(format!("is no file of at most {MOST_BYTES} bytes")));
    }
    std::fs::read_to_string(path).map_err(|error| fault(format!("cannot be read: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The secret of RFC 8032's first test, section 7.1, as OpenSSL keeps keys: known to all, so none.
    const SECRET: [&str; 2] =
        ["302e020100300506032b657004220420", "9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60"];
    /// What `openssl pkey -pubout` makes of it, and of another one.
    const PUBLIC: &str = "MCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=";
    const ANOTHER: &str = "MCowBQYDK2VwAyEAf93is5eyuxdTcPKKxeHdLowVeaOP+mxs/oy5aImjEEg=";
    /// What `openssl pkeyutl -sign -rawin` makes of the manifest below.
    const BY_OPENSSL: &str = "3dItxjW5ZPjMTlk4UzskJpabgKH5hMx96h5R8dOv7vw/rmvKw+Pz07UcjN+GPUDLkCwO12z+sAH7LbKK7XihDw==";
    const TEXT: &str = "{\"engraft_version\": \"0\"}\n";

    #[test]
    fn a_signature_is_openssls_and_holds_for_these_bytes_and_this_key_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let pem =
            |kind: &str, base64: &str| format!("-----BEGIN {kind} KEY-----\n{base64}\n-----END {kind} KEY-----\n");
        let secret = SECRET.concat();
        let bytes = |at: usize| u8::from_str_radix(&secret[at..at + 2], 16).unwrap();
        let secret: Vec<u8> = (0..secret.len()).step_by(2).map(bytes).collect();
        let private = path("a", &pem("PRIVATE", &BASE64_STANDARD.encode(secret)));
        let (public, another) = (path("b", &pem("PUBLIC", PUBLIC)), path("c", &pem("PUBLIC", ANOTHER)));
        path(MANIFEST, TEXT);
        let unsigned = check(folder.path(), &public).unwrap_err();
        assert!(unsigned.to_string().contains("it is not signed"), "{unsigned}");
        let written = sign(folder.path(), &Key::read(&private).unwrap()).unwrap();
        assert_eq!(std::fs::read_to_string(&written).unwrap().trim(), BY_OPENSSL);
        check(folder.path(), &public).unwrap();
        let error = check(folder.path(), &another).unwrap_err();
        assert!(error.exit_code() == 12 && error.to_string().contains("another key"), "{error}");
        path(MANIFEST, &TEXT.replace('0', "1"));
        assert_eq!(check(folder.path(), &public).unwrap_err().exit_code(), 12);
        path(MANIFEST, TEXT);
        path(SIGNATURE, "AAAA");
        assert!(check(folder.path(), &public).unwrap_err().to_string().contains("holds no signature"));
        // The two kinds of key are not taken for one another, and nothing of a key is shown.
        let error = Key::read(&public).err().unwrap();
        assert!(error.exit_code() == 6 && error.to_string().contains("genpkey"), "{error}");
        let error = check(folder.path(), &private).unwrap_err();
        assert!(error.to_string().contains("-pubout") && !error.to_string().contains("MC4C"), "{error}");
        assert!(Key::read(folder.path()).is_err());
    }
}
