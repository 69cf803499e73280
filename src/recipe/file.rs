//! The recipe's file as text: a regular file, of bounded size, in UTF-8.

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::Fault;

/// Largest recipe read. The longest real ones have some 5 KB; the cap bounds what a hostile one can cost.
const MAX_BYTES: u64 = 256 * 1024;

/// The text of the recipe at `path`, without its byte order mark.
pub(super) fn read(path: &Path) -> Result<String, Fault> {
    let fault = |what: &str| Fault::at(path, what);
    // Looked at before it is opened: opening a FIFO waits for a writer.
    let metadata = fs::metadata(path).map_err(|error| missing(path, &error))?;
    if metadata.is_dir() {
        return Err(fault("is a folder, expected a recipe").hint("name the YAML file in it"));
    }
    if !metadata.is_file() {
        return Err(fault("is a pipe, socket or device, expected a regular file").hint("write the recipe to a file"));
    }
    let mut bytes = Vec::new();
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes))
        .map_err(|error| fault(&format!("cannot be read: {error}")))?;
    if bytes.len() as u64 > MAX_BYTES {
        let size = metadata.len().max(MAX_BYTES + 1);
        return Err(fault(&format!("has {size} bytes, a recipe has at most {MAX_BYTES}"))
            .hint("is this the recipe? data belongs into parquet files that the recipe names"));
    }
    decode(path, bytes)
}

fn missing(path: &Path, error: &std::io::Error) -> Fault {
    let fault = Fault::at(path, format!("cannot be read: {error}"));
    let other = match path.extension().and_then(|extension| extension.to_str()) {
        Some("yaml") => path.with_extension("yml"),
        Some("yml") => path.with_extension("yaml"),
        _ => path.with_extension("yaml"),
    };
    if other.is_file() { fault.hint(format!("there is {}", other.display())) } else { fault }
}

fn decode(path: &Path, bytes: Vec<u8>) -> Result<String, Fault> {
    let save = "save the file as UTF-8";
    let utf16 = bytes.starts_with(&[0xFF, 0xFE]) || bytes.starts_with(&[0xFE, 0xFF]);
    // Without a byte order mark, UTF-16 (and UTF-32) shows as ASCII with zeros between.
    if utf16 || (bytes.len() >= 4 && (bytes[..2].contains(&0) && bytes[2..4].contains(&0))) {
        return Err(Fault::at(path, "is not UTF-8: it looks like UTF-16").hint(save));
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let good = error.utf8_error().valid_up_to();
        // The bytes up to `good` are valid UTF-8, so nothing is replaced here.
        let before = String::from_utf8_lossy(&error.as_bytes()[..good]).into_owned();
        let byte = error.as_bytes()[good];
        Fault::new(place(path, &before), format!("is not UTF-8: byte 0x{byte:02X}")).hint(save)
    })?;
    let text = match text.strip_prefix('\u{feff}') {
        Some(rest) => rest.to_string(),
        None => text,
    };
    if let Some((before, _)) = text.split_once('\0') {
        return Err(Fault::new(place(path, before), "holds a NUL character, so it is not a text file").hint(save));
    }
    Ok(text)
}

/// The place right after `before`, the file's text up to there.
fn place(path: &Path, before: &str) -> String {
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    format!("{}:{line}:{column}", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_bytes(bytes: &[u8]) -> Result<String, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.yaml");
        fs::write(&path, bytes).unwrap();
        let name = format!("{}/", folder.path().display());
        read(&path).map_err(|fault| fault.to_string().replace(&name, ""))
    }

    #[test]
    fn a_byte_order_mark_and_crlf_are_fine() {
        assert_eq!(read_bytes(b"\xEF\xBB\xBFa: 1\r\nb: 2\r\n").unwrap(), "a: 1\r\nb: 2\r\n");
    }

    #[test]
    fn other_encodings_are_named() {
        for bytes in [&b"\xFF\xFEa\0:\0"[..], b"\xFE\xFF\0a\0:", b"a\0:\0 \x001\0", b"\0a\0:"] {
            assert!(read_bytes(bytes).unwrap_err().contains("UTF-16"), "{bytes:?}");
        }
        assert!(read_bytes(b"a: 1\nb: caf\xE9\n").unwrap_err().starts_with("r.yaml:2:7: is not UTF-8: byte 0xE9"));
        assert!(read_bytes(b"a: 1\nb: x\0y\n").unwrap_err().starts_with("r.yaml:2:5: holds a NUL"));
    }

    #[test]
    fn only_regular_files_of_bounded_size_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo.yaml");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        assert!(read(&fifo).unwrap_err().what.contains("pipe"));
        assert!(read(folder.path()).unwrap_err().what.contains("folder"));
        assert!(read(Path::new("/dev/zero")).unwrap_err().what.contains("device"));
        assert!(read(&folder.path().join("none.yaml")).unwrap_err().what.contains("cannot be read"));

        let exact = vec![b'#'; MAX_BYTES as usize];
        assert!(read_bytes(&exact).is_ok());
        let mut over = exact;
        over.push(b'#');
        assert!(read_bytes(&over).unwrap_err().contains("262145 bytes"));
    }

    #[test]
    fn the_other_extension_is_offered() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.yml"), "").unwrap();
        assert!(read(&folder.path().join("a.yaml")).unwrap_err().hint.ends_with("a.yml"));
    }
}
