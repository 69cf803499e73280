//! What a file is, by its first bytes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::{Error, Fault, Result};

/// Parquet begins and ends with `PAR1`. Anything else is named where it can be, with the way out.
pub(super) fn check(path: &Path, file: &File, length: u64) -> Result<()> {
    let mut head = [0; 512];
    let mut read = 0;
    while let Ok(more @ 1..) = file.read_at(&mut head[read..], read as u64) {
        read += more;
    }
    let head = &head[..read];
    let mut tail = [0; 4];
    let ends = length >= 12 && file.read_exact_at(&mut tail, length - 4).is_ok();
    let fault = |what: &str, hint: &str| Err(Error::Data(Fault::at(path, what).hint(hint)));
    const AGAIN: &str = "fetch or write the file again";
    if head.starts_with(b"PARE") || (ends && &tail == b"PARE") {
        return fault("is encrypted parquet", "write it without encryption");
    }
    if head.starts_with(b"PAR1") {
        return if ends && &tail == b"PAR1" {
            Ok(())
        } else {
            fault(&format!("is a truncated parquet file: its {length} bytes do not end in PAR1"), AGAIN)
        };
    }
    const CONVERT: &str = "convert it to parquet, for example with Python: \
                           `import datasets; datasets.load_dataset(...).to_parquet(\"data.parquet\")`";
    const PICKLE: &str =
        "pickle files can run code when loaded and are never read; convert it to parquet where you trust it";
    let kinds: [(&[u8], &str, &str); 13] = [
        (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "fetch the file with `git lfs pull`"),
        (b"ARROW1", "is an Arrow IPC file", CONVERT),
        (b"\xff\xff\xff\xff", "is an Arrow IPC stream", CONVERT),
        (b"\x80\x02", "is a pickle file", PICKLE),
        (b"\x80\x03", "is a pickle file", PICKLE),
        (b"\x80\x04", "is a pickle file", PICKLE),
        (b"\x80\x05", "is a pickle file", PICKLE),
        (b"PK\x03\x04", "is a zip archive (or a PyTorch pickle)", PICKLE),
        (b"\x1f\x8b", "is gzip-compressed", "unpack it first with `gunzip`; parquet compresses inside"),
        (b"\x28\xb5\x2f\xfd", "is zstd-compressed", "unpack it first with `unzstd`; parquet compresses inside"),
        (b"SQLite format 3", "is an SQLite database", CONVERT),
        (b"ORC", "is an ORC file", CONVERT),
        (b"Obj\x01", "is an Avro file", CONVERT),
    ];
    if let Some((_, what, hint)) = kinds.iter().find(|(magic, ..)| head.starts_with(magic)) {
        return fault(&format!("{what}, expected parquet"), hint);
    }
    if head.is_empty() {
        return fault("is empty, expected a parquet file", AGAIN);
    }
    let body = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    let text = match std::str::from_utf8(head) {
        Ok(_) => true,
        // Cut inside a character.
        Err(error) => error.error_len().is_none(),
    };
    let what = match body.first() {
        _ if !text || body.contains(&0) => "is not a parquet file: it does not begin with PAR1",
        Some(b'{' | b'[') => "looks like JSON, expected parquet",
        Some(b'<') => "looks like an HTML or XML page, expected parquet",
        _ => "looks like text or CSV, expected parquet",
    };
    fault(what, if text { CONVERT } else { AGAIN })
}
