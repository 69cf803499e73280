//! Files that come from somewhere else: opened only when they are regular files, read only up to a stated size, recognised by
//! their first bytes when they are not what their name says.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::{Error, Fault, Result};

/// The SHA-256 of a file, as 64 lower-case hexadecimal digits. Uses the processor's SHA instructions where it has them.
pub fn sha256_file(path: &Path) -> Result<String> {
    sha256_file_told(path, &mut |_| ())
}

/// [`sha256_file`]; `more` is told again and again how many further bytes have been read.
pub(crate) fn sha256_file_told(path: &Path, more: &mut dyn FnMut(u64)) -> Result<String> {
    let (mut file, _) = open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let read = match file.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(unreadable(path, &error)),
        };
        hash.update(&buffer[..read]);
        more(read as u64);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Opens a regular file and says its length in bytes. A folder, FIFO or device is refused before it is opened: opening a FIFO
/// would wait for a writer that may never come.
pub(super) fn open(path: &Path) -> Result<(File, u64)> {
    let refused = |what: &str| Error::Model(Fault::at(path, what));
    let metadata = path.metadata().map_err(|error| unreadable(path, &error))?;
    if metadata.is_dir() {
        return Err(refused("is a folder, not a file"));
    }
    if !metadata.is_file() {
        return Err(refused("is not a regular file"));
    }
    let file = File::open(path).map_err(|error| unreadable(path, &error))?;
    Ok((file, metadata.len()))
}

/// Reads a whole file of at most `limit` bytes.
pub(crate) fn read(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let (file, length) = open(path)?;
    if length > limit {
        return Err(Error::Model(Fault::at(path, format_args!("is {length} bytes; at most {limit} are read"))));
    }
    let mut bytes = Vec::new();
    // One byte more than allowed is asked for: a file that grows meanwhile is still bounded.
    file.take(limit + 1).read_to_end(&mut bytes).map_err(|error| unreadable(path, &error))?;
    if bytes.len() as u64 > limit {
        return Err(Error::Model(Fault::at(path, format_args!("grew past {limit} bytes while it was read"))));
    }
    Ok(bytes)
}

/// Parses JSON read from `path`; errors name line and column.
pub(super) fn json<T: serde::de::DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    if bytes.starts_with(b"\xef\xbb\xbf") {
        let fault = Fault::at(path, "begins with a byte order mark (EF BB BF), which JSON does not allow");
        return Err(Error::Model(fault.hint("save it as UTF-8 without a byte order mark")));
    }
    serde_json::from_slice(bytes).map_err(|error| {
        let place = format!("{}:{}:{}", path.display(), error.line(), error.column());
        Error::Model(mistaken(Fault::new(place, format_args!("not the JSON expected here: {error}")), bytes))
    })
}

/// Reads a JSON object of at most `limit` bytes.
pub(crate) fn json_object(path: &Path, limit: u64) -> Result<(Value, Vec<u8>)> {
    let bytes = read(path, limit)?;
    let value: Value = json(path, &bytes)?;
    if !value.is_object() {
        return Err(Error::Model(Fault::at(path, "holds JSON, but not an object ({...})")));
    }
    Ok((value, bytes))
}

/// Adds to a fault what the file really is, when its first bytes tell.
pub(super) fn mistaken(fault: Fault, start: &[u8]) -> Fault {
    const KNOWN: &[(&[u8], &str)] = &[
        (
            b"version https://git-lfs",
            "this is a Git LFS pointer, not the file itself: run `git lfs pull` in its folder",
        ),
        (
            b"PK\x03\x04",
            "this is a PyTorch pickle archive, which can run code when opened: convert the model to safetensors",
        ),
        (b"GGUF", "this is a GGUF file: give it the ending .gguf and name it as base_model"),
        (b"\x89HDF", "this is an HDF5 (Keras) file: convert the model to safetensors"),
        (b"<!DOCTYPE", "this is a web page (a failed download?): fetch the file again"),
        (b"<html", "this is a web page (a failed download?): fetch the file again"),
    ];
    if let Some((_, what)) = KNOWN.iter().find(|(magic, _)| start.starts_with(magic)) {
        return fault.hint(what);
    }
    // Protocols 2 to 5: every pickle written since 2003 opens so. (A safetensors header may also be 0x280 bytes long, which is
    // why this is asked only once the file has proved not to be one.)
    if start.len() > 2 && start[0] == 0x80 && (2..=5).contains(&start[1]) {
        return fault.hint("this is a Python pickle, which can run code when opened: convert the model to safetensors");
    }
    fault
}

/// The first bytes of a file, for [`mistaken`]; as many as can be read.
pub(super) fn first_bytes(file: &File) -> Vec<u8> {
    let mut start = vec![0; 32];
    let read = file.read_at(&mut start, 0).unwrap_or(0);
    start.truncate(read);
    start
}

/// An input file that could not be read.
pub(super) fn unreadable(path: &Path, error: &io::Error) -> Error {
    let what = match error.kind() {
        io::ErrorKind::NotFound => "there is no such file".to_string(),
        _ => format!("cannot be read: {error}"),
    };
    Error::Model(Fault::at(path, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sha256_is_the_published_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("abc");
        std::fs::write(&path, "abc").unwrap();
        // FIPS 180-2, appendix B.1.
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(sha256_file(&path).unwrap(), expected);
    }

    #[test]
    fn hashing_says_how_far_it_is_within_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("long");
        std::fs::write(&path, vec![7; (5 << 20) + 3]).unwrap();
        let mut told = Vec::new();
        assert_eq!(sha256_file_told(&path, &mut |more| told.push(more)).unwrap(), sha256_file(&path).unwrap());
        assert_eq!(told.iter().sum::<u64>(), (5 << 20) + 3);
        assert!(told.len() > 5, "{told:?}");
    }

    #[test]
    fn a_folder_a_fifo_and_a_missing_file_are_refused_without_waiting() {
        let folder = tempfile::tempdir().unwrap();
        assert!(sha256_file(folder.path()).unwrap_err().to_string().contains("is a folder"));
        assert!(sha256_file(&folder.path().join("no")).unwrap_err().to_string().contains("no such file"));
        let fifo = folder.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        assert!(read(&fifo, 10).unwrap_err().to_string().contains("not a regular file"));
    }

    #[test]
    fn json_faults_say_line_column_and_what_the_file_is() {
        let path = Path::new("config.json");
        let fault = |bytes: &[u8]| json::<Value>(path, bytes).unwrap_err().to_string();
        assert!(fault(b"\xef\xbb\xbf{}").contains("byte order mark"));
        assert!(fault(b"{\n  \"a\": }").starts_with("config.json:2:8"));
        assert!(fault("[".repeat(200_000).as_bytes()).contains("recursion limit"));
        assert!(fault(b"{\"a\": 1e400}").contains("out of range"));
        assert!(fault(b"version https://git-lfs.github.com/spec/v1\n").contains("git lfs pull"));
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        std::fs::write(&path, "[1]").unwrap();
        assert!(json_object(&path, 100).unwrap_err().to_string().contains("not an object"));
        assert!(json_object(&path, 2).unwrap_err().to_string().contains("is 3 bytes; at most 2"));
    }
}
