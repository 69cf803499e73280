//! What is checked in a parquet file before the decoder sees it.
//!
//! The decoder turns most damage into errors or panics (which are caught), but trusts some numbers so far that it
//! would allocate without bound or overflow the stack, and neither can be caught. Those numbers are read here first:
//! the footer's schema tree and the header of every page that will be decoded. Format: parquet.thrift of
//! apache/parquet-format in Thrift's compact protocol.

mod page;
mod thrift;

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;

use parquet::basic::{Compression, Type};

use page::{DICTIONARY_PAGE, PageHeader, page_header};
use thrift::{Damage, I32, LIST, STRUCT, Thrift};

/// Longest footer read; one row group of one column takes some 100 bytes of it.
const FOOTER_LIMIT: u64 = 64 << 20;
/// Deepest nesting of a schema; a list of structs of lists takes about 8.
const SCHEMA_DEPTH: usize = 64;
/// A page may unpack to this much whatever its packed size...
const PAGE_LIMIT: u64 = 64 << 20;
/// ...and to this many times its packed size beyond that. Real text stays far below.
const PAGE_RATIO: u64 = 200;
/// A column chunk may hold this many values whatever its size, and this many more per packed byte of the row group:
/// run lengths can claim billions of values in a few bytes.
const VALUES_LIMIT: u64 = 16 << 20;
const VALUES_PER_BYTE: u64 = 4;

/// Reads the footer's schema and refuses what the decoder could not survive. `length` is the file's, its magic checked.
pub(super) fn check_footer(file: &File, length: u64) -> Result<(), String> {
    let mut tail = [0; 8];
    file.read_exact_at(&mut tail, length.saturating_sub(8)).map_err(|error| error.to_string())?;
    let footer = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
    if footer + 12 > length {
        return Err(format!("the footer claims {footer} bytes, the file has {length}"));
    }
    if footer > FOOTER_LIMIT {
        return Err(format!("the footer is {footer} bytes long, more than the {FOOTER_LIMIT} that are read"));
    }
    // Bounded by the file's own length and FOOTER_LIMIT.
    let mut bytes = vec![0; footer as usize];
    file.read_exact_at(&mut bytes, length - 8 - footer).map_err(|error| error.to_string())?;
    let mut cursor = Thrift { bytes: &bytes, at: 0 };
    let mut children: Vec<i64> = Vec::new();
    cursor
        .fields(0, &mut |cursor, id, kind| {
            if (id, kind) != (2, LIST) {
                return Ok(false);
            }
            let (count, element) = cursor.list()?;
            for _ in 0..count {
                if element != STRUCT {
                    return Err(Damage::Wrong);
                }
                let mut own = 0;
                cursor.fields(1, &mut |cursor, id, kind| {
                    if (id, kind) == (5, I32) {
                        own = cursor.int()?;
                        return Ok(true);
                    }
                    Ok(false)
                })?;
                children.push(own);
            }
            Ok(true)
        })
        .map_err(|_| "the footer is damaged".to_string())?;
    check_tree(&children)
}

/// The schema is a tree written depth first, each element with the number of its children.
fn check_tree(children: &[i64]) -> Result<(), String> {
    let mut open: Vec<i64> = Vec::new();
    for (index, &own) in children.iter().enumerate() {
        if own < 0 || own > (children.len() - index) as i64 {
            return Err(format!("the footer's schema is damaged: an element claims {own} children"));
        }
        while open.last() == Some(&0) {
            open.pop();
        }
        match open.last_mut() {
            Some(left) => *left -= 1,
            None if index > 0 => return Err("the footer's schema is damaged: it has two roots".into()),
            None => {}
        }
        open.push(own);
        if open.len() > SCHEMA_DEPTH {
            return Err(format!("the schema is nested deeper than {SCHEMA_DEPTH} levels"));
        }
    }
    if open.iter().any(|&left| left > 0) { Err("the footer's schema is cut short".into()) } else { Ok(()) }
}

/// A column chunk, as far as the checks care.
pub(super) struct Chunk {
    /// First byte in the file, dictionary page included.
    pub start: u64,
    /// Packed bytes.
    pub length: u64,
    /// How pages are packed.
    pub compression: Compression,
    /// Stored type.
    pub kind: Type,
}

/// Walks the page headers of the column chunks that are about to be decoded together (one row group, the projected
/// columns) and returns the bytes they unpack to. `length` is the file's.
pub(super) fn check_pages(file: &File, length: u64, chunks: &[Chunk]) -> Result<u64, String> {
    let packed: u64 = chunks.iter().map(|chunk| chunk.length).fold(0, u64::saturating_add);
    if packed > length {
        return Err(format!("the columns claim {packed} bytes, the file has {length}"));
    }
    let mut unpacked: u64 = 0;
    for chunk in chunks {
        let end = chunk.start.checked_add(chunk.length).filter(|end| *end <= length);
        let Some(end) = end else {
            return Err(format!(
                "a column claims bytes {} to {}, the file has {length}",
                chunk.start,
                chunk.start.saturating_add(chunk.length)
            ));
        };
        let mut at = chunk.start;
        let mut values: u64 = 0;
        while at < end {
            let header = page_header(file, at, end)?;
            at += header.length;
            if header.packed > end - at {
                return Err(format!(
                    "a page at byte {at} claims {} bytes, its column ends {} on",
                    header.packed,
                    end - at
                ));
            }
            if header.unpacked > PAGE_LIMIT && header.unpacked / PAGE_RATIO > header.packed {
                return Err(format!(
                    "a page of {} bytes would unpack to {} (a decompression bomb)",
                    header.packed, header.unpacked
                ));
            }
            match header.kind {
                // Each value of a dictionary takes room in its page: 4 bytes of length for strings, at least a bit otherwise.
                DICTIONARY_PAGE => {
                    let room = if chunk.kind == Type::BYTE_ARRAY { header.unpacked / 4 } else { header.unpacked * 8 };
                    if header.values > room {
                        return Err(format!(
                            "a dictionary of {} bytes claims {} values",
                            header.unpacked, header.values
                        ));
                    }
                }
                _ => values += header.values,
            }
            if values > VALUES_LIMIT + VALUES_PER_BYTE * packed {
                return Err(format!("{packed} bytes claim more than {values} values (a decompression bomb)"));
            }
            measure(file, at, &header, chunk.compression)?;
            at += header.packed;
            unpacked = unpacked.saturating_add(header.unpacked);
        }
    }
    Ok(unpacked)
}

/// The decoders of these codecs unpack to the end whatever the header says, so the page is unpacked into nothing first.
fn measure(file: &File, at: u64, header: &PageHeader, compression: Compression) -> Result<(), String> {
    let packed = header.packed.saturating_sub(header.levels);
    let limit = header.unpacked.saturating_sub(header.levels);
    let page = io::BufReader::new(Section { file, at: at + header.levels, left: packed });
    let mut unpacked: Box<dyn Read> = match compression {
        Compression::GZIP(_) => Box::new(flate2::bufread::MultiGzDecoder::new(page)),
        Compression::BROTLI(_) => Box::new(brotli::Decompressor::new(page, 4096)),
        // LZ4's deprecated framed form; a frame unpacks to at most 255 times its size.
        Compression::LZ4 if packed > PAGE_LIMIT / 255 => {
            let mut magic = [0; 4];
            file.read_exact_at(&mut magic, at + header.levels).map_err(|error| error.to_string())?;
            let framed = magic == [0x04, 0x22, 0x4d, 0x18];
            return if framed { Err("an LZ4 frame of this size is not read".into()) } else { Ok(()) };
        }
        _ => return Ok(()),
    };
    let mut buffer = vec![0; 64 << 10];
    let mut total = 0;
    // A damaged page is the decoder's to report: here only the bytes before the damage count.
    while let Ok(read @ 1..) = unpacked.read(&mut buffer) {
        total += read as u64;
        if total > limit {
            return Err(format!("a page that claims {limit} bytes unpacks to more (a decompression bomb)"));
        }
    }
    Ok(())
}

/// A stretch of a file, read by position.
struct Section<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Section<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let read = self.file.read_at(&mut buffer[..wanted], self.at)?;
        self.at += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(kind: i32, unpacked: i32, packed: usize, values: i32) -> Vec<u8> {
        let varint = |value: i64| {
            let mut value = ((value << 1) ^ (value >> 63)) as u64;
            let mut bytes = Vec::new();
            while value > 127 {
                bytes.push(value as u8 | 128);
                value >>= 7;
            }
            bytes.push(value as u8);
            bytes
        };
        let mut bytes = Vec::new();
        for value in [i64::from(kind), i64::from(unpacked), packed as i64] {
            bytes.push(0x15);
            bytes.extend(varint(value));
        }
        // Field 5 (data page) or 7 (dictionary page), its first field num_values.
        bytes.push(if kind == 0 { 0x2c } else { 0x4c });
        bytes.push(0x15);
        bytes.extend(varint(i64::from(values)));
        bytes.extend([0, 0]);
        bytes
    }

    fn checked(compression: Compression, header: Vec<u8>, body: &[u8]) -> Result<u64, String> {
        use std::io::Write;
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&header).unwrap();
        file.write_all(body).unwrap();
        let length = (header.len() + body.len()) as u64;
        check_pages(&file, length, &[Chunk { start: 0, length, compression, kind: Type::BYTE_ARRAY }])
    }

    /// A file that is only a footer: a schema of `children` counts, then `rest`.
    fn footer_only(children: impl ExactSizeIterator<Item = u8>, rest: &[u8]) -> Result<(), String> {
        use std::io::Write;
        let mut footer = vec![0x15, 0x04, 0x19, 0xfc];
        let mut count = children.len();
        while count > 127 {
            footer.push(count as u8 | 128);
            count >>= 7;
        }
        footer.push(count as u8);
        // Field 4 a name, field 5 the number of children.
        children.for_each(|own| footer.extend([0x48, 0x01, b'g', 0x15, own << 1, 0x00]));
        footer.extend(rest);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"PAR1").unwrap();
        file.write_all(&footer).unwrap();
        file.write_all(&(footer.len() as u32).to_le_bytes()).unwrap();
        file.write_all(b"PAR1").unwrap();
        check_footer(&file, footer.len() as u64 + 12)
    }

    #[test]
    fn footers_that_would_overflow_the_stack_or_memory_are_refused() {
        assert_eq!(footer_only([1, 0].into_iter(), &[0]), Ok(()));
        let mut deep = vec![1; 60_000];
        deep.push(0);
        assert!(footer_only(deep.into_iter(), &[0]).unwrap_err().contains("deeper"));
        assert!(footer_only([60, 0].into_iter(), &[0]).unwrap_err().contains("claims 60 children"));
        // A list of 2^28 structs in no bytes.
        let long = [0x29, 0xfc, 0x80, 0x80, 0x80, 0x80, 0x01, 0x00];
        assert!(footer_only([1, 0].into_iter(), &long).unwrap_err().contains("damaged"));
    }

    #[test]
    fn bombs_are_found_before_they_unpack() {
        use std::io::Write;
        let body = vec![0; 100];
        assert_eq!(checked(Compression::SNAPPY, page(0, 1000, 100, 10), &body), Ok(1000));
        let bomb = |header, what: &str| {
            let said = checked(Compression::SNAPPY, header, &body).unwrap_err();
            assert!(said.contains(what), "{said}");
        };
        bomb(page(0, i32::MAX, 100, 10), "decompression bomb");
        bomb(page(0, 1000, 100, i32::MAX), "decompression bomb");
        bomb(page(2, 1000, 100, 251), "dictionary");
        bomb(page(0, 1000, 101, 10), "its column ends");

        let zeros = vec![0; 10 << 20];
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&zeros).unwrap();
        let gzip = gzip.finish().unwrap();
        let mut packed_brotli = Vec::new();
        brotli::CompressorWriter::new(&mut packed_brotli, 4096, 5, 22).write_all(&zeros).unwrap();
        let codecs =
            [(Compression::GZIP(Default::default()), gzip), (Compression::BROTLI(Default::default()), packed_brotli)];
        for (codec, packed) in codecs {
            let said = checked(codec, page(0, 1000, packed.len(), 10), &packed).unwrap_err();
            assert!(said.contains("unpacks to more"), "{said}");
            let honest = page(0, zeros.len() as i32, packed.len(), 10);
            assert_eq!(checked(codec, honest, &packed), Ok(zeros.len() as u64));
        }
    }

    #[test]
    fn trees_are_checked() {
        assert_eq!(check_tree(&[2, 0, 1, 0]), Ok(()));
        assert!(check_tree(&[2, 0]).is_err());
        assert!(check_tree(&[1, 0, 0]).unwrap_err().contains("two roots"));
        assert!(check_tree(&[1, i64::from(i32::MAX), 0]).unwrap_err().contains("children"));
        assert!(check_tree(&[1; 1000]).unwrap_err().contains("deeper"));
    }
}
