//! The safetensors header: 8 bytes of length, JSON, then the tensors' bytes without gaps.
//!
//! Format: <https://github.com/huggingface/safetensors#format>. The header is checked as strictly as the reference does (and its
//! duplicate keys too), but each fault names the tensor and both values. Nothing the header says is used before it is checked.

use std::collections::BTreeMap;
use std::collections::HashSet;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, Visitor};

use super::file;
use super::storage::Dtype;
use crate::{Error, Fault, Result};

/// The reference's own limit: a header of 100 MB names over a million tensors.
const MAX_HEADER: u64 = 100_000_000;
/// What libtorch's iterators take.
const MAX_DIMENSIONS: usize = 64;

/// A tensor as a header describes it, checked against the file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub name: String,
    pub dtype: &'static Dtype,
    pub shape: Vec<i64>,
    /// First byte in the file.
    pub offset: u64,
    pub bytes: u64,
}

/// Reads and checks the header; entries come in the order of their bytes.
pub(super) fn read_header(path: &Path, file: &File, length: u64) -> Result<Vec<Entry>> {
    let fault = |what: fmt::Arguments| Error::Model(file::mistaken(Fault::at(path, what), &file::first_bytes(file)));
    if length < 8 {
        return Err(fault(format_args!(
            "is {length} bytes long; a safetensors file begins with 8 bytes of header length (an interrupted download?)"
        )));
    }
    let mut prefix = [0; 8];
    file.read_exact_at(&mut prefix, 0).map_err(|error| file::unreadable(path, &error))?;
    let header = u64::from_le_bytes(prefix);
    if header > MAX_HEADER {
        return Err(fault(format_args!(
            "not a safetensors file: its header would be {header} bytes; at most {MAX_HEADER} are allowed"
        )));
    }
    if header > length - 8 {
        return Err(fault(format_args!("its header is {header} bytes, but only {} follow: truncated", length - 8)));
    }
    let mut json = vec![0; header as usize];
    file.read_exact_at(&mut json, 8).map_err(|error| file::unreadable(path, &error))?;
    let json = std::str::from_utf8(&json).map_err(|error| fault(format_args!("its header is not UTF-8: {error}")))?;
    let header: Header =
        serde_json::from_str(json).map_err(|error| fault(format_args!("its header is not valid: {error}")))?;
    check(path, header, 8 + json.len() as u64, length)
}

/// Checks that the tensors tile the data exactly: `start` is its first byte in the file, `length` the file's.
fn check(path: &Path, header: Header, start: u64, length: u64) -> Result<Vec<Entry>> {
    let place = |name: &str| format!("{}: {name}", path.display());
    let fault = |name: &str, what: fmt::Arguments| Error::Model(Fault::new(place(name), what));
    let data = length - start;
    let mut tensors = header.tensors;
    tensors.sort_by_key(|(_, info)| info.data_offsets);

    let mut entries: Vec<Entry> = Vec::with_capacity(tensors.len());
    let mut expected = 0;
    for (name, Info { dtype, shape, data_offsets: (begin, end) }) in tensors {
        if begin > end {
            return Err(fault(&name, format_args!("its bytes begin at {begin} but end at {end}")));
        }
        let Some(dtype) = Dtype::named(&dtype) else {
            let known: Vec<_> = Dtype::ALL.iter().filter(|d| d.kind.is_some()).map(|d| d.name).collect();
            let fault = Fault::new(place(&name), format_args!("unknown dtype {dtype:?}"));
            return Err(Error::Model(fault.hint(format_args!("supported: {}", known.join(", ")))));
        };
        if shape.len() > MAX_DIMENSIONS {
            return Err(fault(
                &name,
                format_args!("has {} dimensions; at most {MAX_DIMENSIONS} are supported", shape.len()),
            ));
        }
        let size = shape
            .iter()
            .try_fold(1u64, |product, &size| product.checked_mul(size))
            .and_then(|count| count.checked_mul(dtype.bits))
            .filter(|&bits| bits / 8 <= i64::MAX as u64 && shape.iter().all(|&size| size <= i64::MAX as u64));
        let Some(bits) = size else {
            return Err(fault(&name, format_args!("its shape {shape:?} of {} overflows", dtype.name)));
        };
        if bits % 8 != 0 || bits / 8 != end - begin {
            return Err(fault(
                &name,
                format_args!(
                    "its shape {shape:?} of {} takes {} bytes, but its offsets span {}",
                    dtype.name,
                    bits.div_ceil(8),
                    end - begin
                ),
            ));
        }
        if begin < expected {
            let before = entries.last().map_or("", |entry| entry.name.as_str());
            return Err(fault(
                &name,
                format_args!("its bytes begin at {begin}, inside those of {before}, which end at {expected}"),
            ));
        }
        if begin > expected {
            return Err(fault(
                &name,
                format_args!("its bytes begin at {begin}, but the tensor before ends at {expected}: a hole"),
            ));
        }
        if end > data {
            return Err(fault(
                &name,
                format_args!("its bytes end at {end}, but the file holds {data} after its header: truncated"),
            ));
        }
        expected = end;
        let shape = shape.iter().map(|&size| size as i64).collect();
        entries.push(Entry { name, dtype, shape, offset: start + begin, bytes: end - begin });
    }
    if expected != data {
        let what = format_args!("{} bytes follow the last tensor, which ends at {expected}", data - expected);
        return Err(Error::Model(Fault::at(path, what)));
    }
    Ok(entries)
}

/// The header's JSON.
struct Header {
    tensors: Vec<(String, Info)>,
}

#[derive(Deserialize)]
struct Info {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Tensors;
        impl<'de> Visitor<'de> for Tensors {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
                let mut seen = HashSet::new();
                let mut tensors = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    let within = |error: A::Error| de::Error::custom(format_args!("{name}: {error}"));
                    if name == "__metadata__" {
                        map.next_value::<Option<BTreeMap<String, String>>>().map_err(within)?;
                    } else {
                        let info = map.next_value::<Info>().map_err(within)?;
                        tensors.push((name.clone(), info));
                    }
                    if !seen.insert(name.clone()) {
                        return Err(de::Error::custom(format_args!("{name} appears twice")));
                    }
                }
                Ok(Header { tensors })
            }
        }
        deserializer.deserialize_map(Tensors)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn read(bytes: &[u8]) -> Result<Vec<Entry>> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        std::fs::write(&path, bytes).unwrap();
        read_header(&path, &File::open(&path).unwrap(), bytes.len() as u64)
    }

    fn fault(bytes: &[u8]) -> String {
        let error = read(bytes).unwrap_err();
        assert_eq!(error.exit_code(), 5);
        error.to_string()
    }

    fn header_fault(header: &str, data: usize) -> String {
        fault(&file(header, data))
    }

    #[test]
    fn good_headers_are_read() {
        let header = r#"{"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},
            "empty":{"dtype":"F32","shape":[0,7],"data_offsets":[12,12]},
            "scalar":{"dtype":"I64","shape":[],"data_offsets":[12,20]},
            "__metadata__":{"format":"pt"}}   "#;
        let entries = read(&file(header, 20)).unwrap();
        let names: Vec<_> = entries.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["b", "empty", "scalar"]);
        assert_eq!(entries[0].shape, [2, 3]);
        assert_eq!((entries[2].offset, entries[2].bytes), (8 + header.len() as u64 + 12, 8));
        assert_eq!(entries[2].shape, [0i64; 0]);
        assert_eq!(read(&file("{}", 0)).unwrap(), []);
    }

    #[test]
    fn damaged_beginnings_are_named() {
        assert!(fault(b"").contains("is 0 bytes long"));
        assert!(fault(b"1234567").contains("is 7 bytes long"));
        let long = |length: u64| fault(&[length.to_le_bytes().as_slice(), b"{}"].concat());
        assert!(long(3).contains("header is 3 bytes, but only 2 follow"));
        assert!(long(100_000_001).contains("100000001 bytes; at most 100000000"));
        assert!(long(u64::MAX).contains("at most 100000000"));
        assert!(fault(&[4u64.to_le_bytes().as_slice(), b"\xff\xfe{}"].concat()).contains("not UTF-8"));
        assert!(header_fault("[1]", 0).contains("an object of tensors"));
        assert!(header_fault("{\"a\":", 0).contains("EOF"));
        assert!(header_fault(&"[".repeat(100_000), 0).contains("not valid"));
        assert!(header_fault(&format!("{{\"a\":{}", "{\"a\":".repeat(100_000)), 0).contains("not valid"));
    }

    #[test]
    fn other_files_under_this_name_are_recognised() {
        assert!(fault(b"PK\x03\x04aaaaaaaaaaaa").contains("PyTorch pickle archive"));
        assert!(fault(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.").contains("a Python pickle"));
        assert!(fault(b"version https://git-lfs.github.com/spec/v1\noid sha256:00").contains("git lfs pull"));
        assert!(fault(b"GGUF\x03\0\0\0\0\0\0\0").contains("GGUF file"));
        // A header of 0x280 bytes begins like a pickle of protocol 2, and is none.
        let header = format!("{{{}}}", " ".repeat(0x27e));
        assert_eq!(file(&header, 0)[..2], [0x80, 0x02]);
        read(&file(&header, 0)).unwrap();
    }

    #[test]
    fn damaged_tensors_are_named_with_both_values() {
        let one = |dtype: &str, shape: &str, begin: i64, end: i64| {
            format!(r#"{{"a.b":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}}}"#)
        };
        let check = |header: String, data: usize, parts: &[&str]| {
            let text = header_fault(&header, data);
            assert!(text.contains("a.b"), "{text}");
            for part in parts {
                assert!(text.contains(part), "{text} lacks {part}");
            }
        };
        check(one("F32", "[2]", 8, 0), 8, &["begin at 8 but end at 0"]);
        check(one("F32", "[3]", 0, 8), 8, &["[3] of F32 takes 12 bytes", "span 8"]);
        check(one("Q32", "[2]", 0, 8), 8, &["unknown dtype \"Q32\"", "BF16"]);
        check(one("F32", "[2]", 0, 8), 6, &["end at 8", "holds 6", "truncated"]);
        check(one("F32", "[2]", 4, 12), 12, &["begin at 4", "ends at 0", "hole"]);
        check(one("F32", "[-2]", 0, 8), 8, &["not valid", "expected u64"]);
        check(one("F32", "[4294967296,4294967296]", 0, 8), 8, &["overflows"]);
        check(one("F32", "[0,9223372036854775808]", 0, 0), 0, &["overflows"]);
        check(one("F32", "[9223372036854775807]", 0, 8), 8, &["overflows"]);
        check(one("F4", "[3]", 0, 2), 2, &["takes 2 bytes"]);
        let many = format!("[{}]", vec!["1"; 100].join(","));
        check(one("F32", &many, 0, 4), 4, &["100 dimensions"]);
        check(one("F32", "[2]", 0, 8).replace("\"dtype\"", "\"dtype\":\"F32\",\"dtype\""), 8, &["duplicate field"]);
        assert!(header_fault(&one("F32", "[2]", 0, 8), 9).contains("1 bytes follow the last tensor"));
    }

    #[test]
    fn overlaps_duplicates_and_metadata_are_checked() {
        let overlap = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}}"#;
        assert!(header_fault(overlap, 6).contains("b: its bytes begin at 2, inside those of a, which end at 4"));
        let same = r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#;
        assert!(header_fault(same, 8).contains("a appears twice"));
        assert!(
            header_fault(r#"{"__metadata__":{"format":1}}"#, 0).contains("__metadata__: invalid type: integer `1`")
        );
        assert!(header_fault(r#"{"__metadata__":{},"__metadata__":{}}"#, 0).contains("appears twice"));
    }

    /// Mutated headers never panic, and what is accepted is exactly what the reference accepts (it does not look for duplicates).
    #[test]
    fn mutated_headers_are_judged_as_by_the_reference() {
        let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[0,8]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[8,14]},"c":{"dtype":"U8","shape":[0],"data_offsets":[14,14]}}"#;
        let good = file(header, 14);
        let path = Path::new("x.safetensors");
        let file = tempfile::tempfile().unwrap();
        let mut random = 0x2545_f491_4f6c_dd1d_u64;
        let mut next = |below: usize| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            (random % below as u64) as usize
        };
        let (mut accepted, mut judged) = (0, 0);
        for _ in 0..5_000 {
            let mut bytes = good.clone();
            for _ in 0..=next(3) {
                let at = next(bytes.len().max(1));
                if at >= bytes.len() {
                    break;
                }
                match next(4) {
                    0 => bytes[at] = b"0123456789,:[]{}\"-"[next(18)],
                    1 => bytes[at] ^= 1 << next(8),
                    2 => drop(bytes.remove(at)),
                    _ => bytes.truncate(at.max(1)),
                }
            }
            file.write_all_at(&bytes, 0).unwrap();
            file.set_len(bytes.len() as u64).unwrap();
            let ours = read_header(path, &file, bytes.len() as u64);
            let reference = ::safetensors::SafeTensors::read_metadata(&bytes);
            match (&ours, &reference) {
                (Ok(_), Ok(_)) => accepted += 1,
                (Err(error), Ok(_)) => {
                    let text = error.to_string();
                    assert!(text.contains("twice") || text.contains("overflows"), "{text}: {}", bytes.escape_ascii());
                }
                (Ok(_), Err(error)) => panic!("only the reference refuses: {error}: {}", bytes.escape_ascii()),
                (Err(_), Err(_)) => {}
            }
            judged += 1;
        }
        assert!(accepted > 25 && accepted < judged, "{accepted} of {judged}");
    }
}
