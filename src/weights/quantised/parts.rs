//! The tensors that stand for one quantised weight, found and checked before anything is read.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;

use tch::{Kind, Tensor};

use crate::weights::storage::{self, Dtype, Source};
use crate::weights::{Form, Stored};
use crate::{Error, Fault, Result};

/// A tensor of the checkpoint that belongs to another.
#[derive(Debug)]
pub(in crate::weights) struct Part {
    pub name: String,
    pub dtype: &'static Dtype,
    pub shape: Vec<i64>,
    pub file: usize,
    pub offset: u64,
}

impl Part {
    /// Bytes in its file.
    pub fn bytes(&self) -> u64 {
        self.shape.iter().product::<i64>() as u64 * self.dtype.bits / 8
    }
}

/// A checkpoint's tensors, none of them put together yet.
pub(super) struct All<'a> {
    pub files: &'a [PathBuf],
    pub opened: &'a [File],
    pub by_name: HashMap<&'a str, &'a Stored>,
}

impl<'a> All<'a> {
    /// `None` where a tensor is there twice: that is refused when the checkpoint is put together.
    pub fn new((files, opened): (&'a [PathBuf], &'a [File]), tensors: &'a [Stored]) -> Option<Self> {
        let by_name: HashMap<&str, &Stored> = tensors.iter().map(|tensor| (tensor.name.as_str(), tensor)).collect();
        (by_name.len() == tensors.len()).then_some(Self { files, opened, by_name })
    }

    /// A fault of a tensor that does not belong to the others.
    pub fn fault(&self, tensor: &Stored, what: String) -> Error {
        let place = format!("{}: {}", self.files[tensor.file].display(), tensor.stored_name);
        let hint = "is the download complete? fetch the model again, or name its unquantised version";
        Error::Model(Fault::new(place, what).hint(hint))
    }

    /// A tensor by name.
    pub fn find(&self, name: &str) -> Option<&'a Stored> {
        self.by_name.get(name).copied()
    }

    /// A tensor that `of` needs.
    pub fn needed(&self, of: &Stored, name: &str) -> Result<&'a Stored> {
        self.find(name).ok_or_else(|| self.fault(of, format!("needs {name}, which is missing")))
    }

    /// A tensor that `of` needs, of one of `dtypes` (the first of which is told) and `count` numbers.
    pub fn part(&self, of: &Stored, name: String, dtypes: &[&str], count: i64) -> Result<Part> {
        let found = self.needed(of, &name)?;
        let numbers: i64 = found.shape.iter().product();
        if !dtypes.contains(&dtype(found).name) || numbers != count {
            let what = format!(
                "is {} {:?}, but {} of {count} numbers belongs to {}",
                dtype(found).name,
                found.shape,
                dtypes[0],
                of.name
            );
            return Err(self.fault(found, what));
        }
        Ok(Part::of(found))
    }

    /// A tensor that `of` needs, of one of `dtypes` (the first of which is told) and in a shape that `why` explains.
    pub fn shaped(&self, of: &Stored, name: &str, dtypes: &[&str], shape: &[i64], why: &str) -> Result<Part> {
        let found = self.needed(of, name)?;
        if !dtypes.contains(&dtype(found).name) || found.shape != shape {
            let what = format!(
                "is {} {:?}, but {} {shape:?} belongs to {} {:?} ({why})",
                dtype(found).name,
                found.shape,
                dtypes[0],
                of.stored_name,
                of.shape
            );
            return Err(self.fault(found, what));
        }
        Ok(Part::of(found))
    }

    /// Where a tensor's bytes are.
    pub fn source(&'a self, tensor: &'a Stored) -> Source<'a> {
        let (path, file) = (&self.files[tensor.file], &self.opened[tensor.file]);
        Source { path, file, name: &tensor.stored_name, offset: tensor.offset }
    }
}

/// The number type a tensor is stored in.
pub(super) fn dtype(tensor: &Stored) -> &'static Dtype {
    let Form::Plain(dtype) = tensor.form else { unreachable!("nothing is paired before") };
    dtype
}

impl Part {
    pub fn of(tensor: &Stored) -> Self {
        let (file, offset) = (tensor.file, tensor.offset);
        Self { name: tensor.stored_name.clone(), dtype: dtype(tensor), shape: tensor.shape.clone(), file, offset }
    }

    /// Where its bytes are.
    pub fn source<'a>(&'a self, files: &'a [PathBuf], opened: &'a [File]) -> Source<'a> {
        Source { path: &files[self.file], file: &opened[self.file], name: &self.name, offset: self.offset }
    }

    /// Its numbers, in its shape.
    pub fn tensor(&self, files: &[PathBuf], opened: &[File], kind: Kind) -> Result<Tensor> {
        storage::read_plain(self.source(files, opened), self.dtype, &self.shape, kind)
    }

    /// Its numbers in the number type it is stored in.
    pub fn as_stored(&self, files: &[PathBuf], opened: &[File]) -> Result<Tensor> {
        let kind = self.dtype.kind.expect("a type that was asked for by name");
        self.tensor(files, opened, kind)
    }
}
