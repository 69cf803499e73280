//! Thrift's compact protocol, read without allocating.

pub(super) const I32: u8 = 5;

pub(super) const LIST: u8 = 9;

pub(super) const STRUCT: u8 = 12;

#[derive(Debug, PartialEq)]
pub(super) enum Damage {
    /// The bytes end too early.
    Short,
    /// The bytes make no sense.
    Wrong,
}

/// A reader of Thrift's compact protocol that allocates nothing.
pub(super) struct Thrift<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) at: usize,
}

/// Given (reader, field id, type), reads the field and returns true, or leaves it alone and returns false.
pub(super) type Visit<'v> = dyn FnMut(&mut Thrift, i16, u8) -> Result<bool, Damage> + 'v;

impl Thrift<'_> {
    pub(super) fn byte(&mut self) -> Result<u8, Damage> {
        let byte = *self.bytes.get(self.at).ok_or(Damage::Short)?;
        self.at += 1;
        Ok(byte)
    }

    pub(super) fn varint(&mut self) -> Result<u64, Damage> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(Damage::Wrong)
    }

    pub(super) fn int(&mut self) -> Result<i64, Damage> {
        let value = self.varint()?;
        Ok((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    pub(super) fn unsigned(&mut self) -> Result<u64, Damage> {
        let value = self.int()?;
        if value > i64::from(i32::MAX) { Err(Damage::Wrong) } else { u64::try_from(value).map_err(|_| Damage::Wrong) }
    }

    /// Length and element type; a list of n elements takes at least n bytes.
    pub(super) fn list(&mut self) -> Result<(usize, u8), Damage> {
        let head = self.byte()?;
        let count = if head >> 4 == 15 { self.varint()? } else { u64::from(head >> 4) };
        if count > (self.bytes.len() - self.at) as u64 {
            return Err(Damage::Short);
        }
        Ok((count as usize, head & 15))
    }

    pub(super) fn advance(&mut self, count: u64) -> Result<(), Damage> {
        if count > (self.bytes.len() - self.at) as u64 {
            return Err(Damage::Short);
        }
        self.at += count as usize;
        Ok(())
    }

    pub(super) fn fields(&mut self, depth: usize, visit: &mut Visit) -> Result<(), Damage> {
        let mut id: i16 = 0;
        loop {
            let head = self.byte()?;
            if head == 0 {
                return Ok(());
            }
            id = match head >> 4 {
                0 => i16::try_from(self.int()?).map_err(|_| Damage::Wrong)?,
                step => id.checked_add(i16::from(step)).ok_or(Damage::Wrong)?,
            };
            if !visit(self, id, head & 15)? {
                self.skip(head & 15, depth, false)?;
            }
        }
    }

    /// In a list a boolean takes a byte; as a field its value is its type.
    pub(super) fn skip(&mut self, kind: u8, depth: usize, in_list: bool) -> Result<(), Damage> {
        if depth > 32 {
            return Err(Damage::Wrong);
        }
        match kind {
            1 | 2 => self.advance(u64::from(in_list)),
            3 => self.advance(1),
            4..=6 => self.varint().map(|_| ()),
            7 => self.advance(8),
            8 => {
                let length = self.varint()?;
                self.advance(length)
            }
            LIST | 10 => {
                let (count, element) = self.list()?;
                (0..count).try_for_each(|_| self.skip(element, depth + 1, true))
            }
            11 => {
                let count = self.varint()?;
                if count == 0 {
                    return Ok(());
                }
                let kinds = self.byte()?;
                (0..count).try_for_each(|_| {
                    self.skip(kinds >> 4, depth + 1, true)?;
                    self.skip(kinds & 15, depth + 1, true)
                })
            }
            STRUCT => self.fields(depth + 1, &mut |_, _, _| Ok(false)),
            13 => self.advance(16),
            _ => Err(Damage::Wrong),
        }
    }
}
