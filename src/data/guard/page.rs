//! The header of a page.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::thrift::{Damage, I32, STRUCT, Thrift};

/// Longest page header read; it is long where the writer put untruncated statistics into it.
const HEADER_LIMIT: usize = 16 << 20;

/// `PageType::DICTIONARY_PAGE` of parquet.thrift.
pub(super) const DICTIONARY_PAGE: i64 = 2;

#[derive(Debug, Default, PartialEq)]
pub(super) struct PageHeader {
    pub(super) kind: i64,
    pub(super) unpacked: u64,
    pub(super) packed: u64,
    pub(super) values: u64,
    /// Bytes at the front of a data page v2 that are never packed.
    pub(super) levels: u64,
    /// Of the header itself.
    pub(super) length: u64,
}

pub(super) fn page_header(file: &File, at: u64, end: u64) -> Result<PageHeader, String> {
    let mut size = 1 << 10;
    loop {
        let available = usize::try_from(end - at).unwrap_or(usize::MAX).min(size);
        let mut bytes = vec![0; available];
        file.read_exact_at(&mut bytes, at).map_err(|error| error.to_string())?;
        match parse_page_header(&bytes) {
            Ok(header) => return Ok(header),
            Err(Damage::Short) if available == size && size < HEADER_LIMIT => size *= 16,
            Err(_) => return Err(format!("the page header at byte {at} is damaged")),
        }
    }
}

fn parse_page_header(bytes: &[u8]) -> Result<PageHeader, Damage> {
    let mut cursor = Thrift { bytes, at: 0 };
    let mut header = PageHeader::default();
    let mut seen = 0;
    cursor.fields(0, &mut |cursor, id, kind| {
        match (id, kind) {
            (1, I32) => header.kind = cursor.int()?,
            (2, I32) => header.unpacked = cursor.unsigned()?,
            (3, I32) => header.packed = cursor.unsigned()?,
            // data_page_header, dictionary_page_header, data_page_header_v2: num_values is the first field of each.
            (5 | 7 | 8, STRUCT) => cursor.fields(1, &mut |cursor, inner, kind| {
                match (id, inner, kind) {
                    (_, 1, I32) => header.values = cursor.unsigned()?,
                    // data_page_header_v2: bytes of definition and of repetition levels.
                    (8, 5 | 6, I32) => header.levels += cursor.unsigned()?,
                    _ => return Ok(false),
                }
                Ok(true)
            })?,
            _ => return Ok(false),
        }
        seen |= 1 << id;
        Ok(true)
    })?;
    if seen & 0b1110 != 0b1110 || header.levels > header.packed.min(header.unpacked) {
        return Err(Damage::Wrong);
    }
    header.length = cursor.at as u64;
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_header_is_read() {
        // type 0, unpacked 300, packed 20, data_page_header { num_values 7, encoding 0, ... }, end.
        let bytes = [0x15, 0x00, 0x15, 0xd8, 0x04, 0x15, 0x28, 0x2c, 0x15, 0x0e, 0x15, 0x00, 0x00, 0x00];
        let header = parse_page_header(&bytes).unwrap();
        assert_eq!(header, PageHeader { kind: 0, unpacked: 300, packed: 20, values: 7, levels: 0, length: 14 });
        for cut in 0..bytes.len() {
            assert_eq!(parse_page_header(&bytes[..cut]), Err(Damage::Short), "cut at {cut}");
        }
    }

    #[test]
    fn a_negative_page_size_is_damage() {
        assert_eq!(parse_page_header(&[0x15, 0x00, 0x15, 0x01, 0x15, 0x28, 0x00]), Err(Damage::Wrong));
    }

    #[test]
    fn random_bytes_never_hang_or_panic() {
        let mut state = 1u64;
        for _ in 0..20_000 {
            let bytes: Vec<u8> = (0..40)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 56) as u8
                })
                .collect();
            let _ = parse_page_header(&bytes);
        }
    }
}
