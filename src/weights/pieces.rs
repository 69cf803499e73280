//! A stored tensor's numbers, a piece at a time, for those who look at each of them once: no tensor is made whole for that, but where it
//! is stored in another order than its own.

use tch::{Device, Kind, Tensor};

use super::gguf::{self, Conversion, Quantisation};
use super::storage::{self, Dtype, Source};
use super::{Checkpoint, Form};
use crate::Result;

/// The numbers of one tensor, in their order.
pub(crate) struct Pieces<'a> {
    /// How many there are.
    pub count: i64,
    kept: Kept<'a>,
}

enum Kept<'a> {
    /// As plain numbers.
    Plain(Source<'a>, &'static Dtype),
    /// In blocks, one after the other.
    Blocks(Source<'a>, &'static Quantisation, Conversion),
    /// Of one dimension.
    Whole(Tensor),
}

impl Pieces<'_> {
    /// Numbers of a piece: whole blocks of every format.
    pub const LENGTH: i64 = 1 << 19;

    /// The first number of each piece, and how many it has.
    pub fn places(&self) -> impl Iterator<Item = (i64, i64)> + use<> {
        let count = self.count;
        (0..count).step_by(Self::LENGTH as usize).map(move |first| (first, Self::LENGTH.min(count - first)))
    }

    /// The numbers of a piece, of one dimension, as `kind`, a floating-point one.
    ///
    /// Errors: those of [`Checkpoint::tensor`].
    pub fn piece(&self, (first, length): (i64, i64), kind: Kind) -> Result<Tensor> {
        let found = match &self.kept {
            Kept::Plain(source, dtype) => {
                let source = Source { offset: source.offset + first as u64 * dtype.bits / 8, ..*source };
                storage::read_plain(source, dtype, &[length], dtype.kind.unwrap_or(kind))?
            }
            Kept::Blocks(source, blocks, order) => {
                let source = Source { offset: source.offset + blocks.size(first as usize) as u64, ..*source };
                gguf::read_blocks(source, blocks, *order, &[length], Kind::Float)?
            }
            Kept::Whole(tensor) => tensor.narrow(0, first, length),
        };
        Ok(found.to_kind(kind))
    }

    /// Where plain numbers are, and of which type.
    pub(super) fn plain(&self) -> Option<(Source<'_>, &'static Dtype)> {
        match self.kept {
            Kept::Plain(source, dtype) => Some((source, dtype)),
            Kept::Blocks(..) | Kept::Whole(_) => None,
        }
    }
}

impl Checkpoint {
    /// A tensor's numbers for one look at each.
    ///
    /// Errors: those of [`Checkpoint::tensor`].
    pub(crate) fn pieces(&self, name: &str) -> Result<Pieces<'_>> {
        let whole = || -> Result<_> { Ok(Kept::Whole(self.tensor(name, Kind::Float, Device::Cpu)?.flatten(0, -1))) };
        let Some(stored) = self.find(name) else { return whole().map(|kept| Pieces { count: 0, kept }) };
        let source = self.source_of(stored.file, &stored.stored_name, stored.offset);
        let kept = match &stored.form {
            Form::Plain(dtype) if dtype.kind.is_some() => Kept::Plain(source, dtype),
            Form::Blocks(blocks, Conversion::Same) => Kept::Blocks(source, blocks, Conversion::Same),
            Form::Blocks(numbers, Conversion::FromOne) if numbers.values == 1 => {
                Kept::Blocks(source, numbers, Conversion::FromOne)
            }
            _ => whole()?,
        };
        Ok(Pieces { count: stored.shape.iter().product(), kept })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::recipe::BaseSource;

    /// Of GGUF's files: rows that lie as they are, rows in pairs, norms from one on.
    #[test]
    fn pieces_are_the_tensor() {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let gguf = |name: &str| BaseSource::Gguf(fixtures.join("gguf").join(name));
        for source in [
            gguf("llama.gguf"),
            gguf("gemma.gguf"),
            gguf("mixtral.gguf"),
            BaseSource::Folder(fixtures.join("peft/base-tied")),
        ] {
            let checkpoint = Checkpoint::open(&source).unwrap();
            for name in checkpoint.names() {
                let pieces = checkpoint.pieces(name).unwrap();
                let all: Vec<Tensor> = pieces.places().map(|place| pieces.piece(place, Kind::Float).unwrap()).collect();
                let whole = checkpoint.tensor(name, Kind::Float, Device::Cpu).unwrap();
                assert!(Tensor::cat(&all, 0).view(&whole.size()[..]).equal(&whole), "{name}");
            }
        }
    }

    #[test]
    fn a_large_tensor_has_several_and_damage_in_one_of_them_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("w.safetensors");
        let count = 2 * Pieces::LENGTH + 5;
        for kind in [Kind::BFloat16, Kind::Float, Kind::Double, Kind::Int64] {
            let whole = Tensor::arange(count, (Kind::Int64, Device::Cpu)).remainder(127).to_kind(kind);
            Tensor::write_safetensors(&[("w", &whole)], &path).unwrap();
            let checkpoint = Checkpoint::open_file(&path).unwrap();
            let pieces = checkpoint.pieces("w").unwrap();
            let all: Vec<Tensor> = pieces.places().map(|place| pieces.piece(place, Kind::Double).unwrap()).collect();
            assert_eq!(all.len(), 3);
            assert!(Tensor::cat(&all, 0).equal(&whole.to_kind(Kind::Double)), "{kind:?}");
        }
        let damaged = Tensor::ones([count], (Kind::Float, Device::Cpu));
        let _ = damaged.get(count - 1).fill_(f64::NAN);
        Tensor::write_safetensors(&[("w", &damaged)], &path).unwrap();
        let checkpoint = Checkpoint::open_file(&path).unwrap();
        let pieces = checkpoint.pieces("w").unwrap();
        let found: Vec<_> = pieces.places().map(|place| pieces.piece(place, Kind::Double)).collect();
        assert!(found[0].is_ok() && found[1].is_ok());
        assert!(found[2].as_ref().unwrap_err().to_string().contains("1 value is NaN or infinite"));
        assert!(checkpoint.pieces("v").is_err());
    }
}
