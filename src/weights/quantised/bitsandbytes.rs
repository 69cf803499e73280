//! Weights as bitsandbytes stores them: four-bit blocks (`Linear4bit`) and rows of eight-bit integers (`Linear8bitLt`).
//!
//! `quantization_config {"quant_method": "bitsandbytes"}`. Four bits: `X.weight` is packed codes, `X.weight.absmax` the blocks'
//! magnitudes, `X.weight.quant_map` what codes stand for, `X.weight.quant_state.bitsandbytes__nf4` (or `__fp4`) JSON as bytes with shape,
//! block size and number type; with double quantisation `X.weight.nested_absmax` and `X.weight.nested_quant_map`, too. Eight bits:
//! `X.weight` is integers, `X.SCB` the rows' magnitudes. A checkpoint shows the weights alone, in their own shapes.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::parts::{All, Part};
use super::{method, quantisation};
use crate::Result;
use crate::quant::four_bit::{Absmax, BLOCKS, NESTED_BLOCK};
use crate::quant::{self, FourBit, FourBitType, Int8, Quantised};
use crate::weights::storage::{self, Dtype, Source};
use crate::weights::{Form, Stored};

/// Its `quant_method`.
pub(super) const METHOD: &str = "bitsandbytes";
/// Before the name of the number type, after the name of a weight.
const STATE: &str = ".quant_state.bitsandbytes__";
/// More bytes than any state has.
const MOST_STATE: u64 = 1 << 16;
/// After the name of a module: the rows' magnitudes of its eight-bit weight.
const ROWS: &str = ".SCB";
/// After the name of a module: how its eight-bit weight lies, which is row after row.
const FORMAT: &str = ".weight_format";

/// What makes numbers of a weight's codes.
#[derive(Debug)]
pub(in crate::weights) enum Parts {
    FourBit { code: FourBitType, block: i64, stored: Kind, absmax: Part, nested: Option<Nested> },
    Int8 { absmax: Part },
}

/// Double quantisation.
#[derive(Debug)]
pub(in crate::weights) struct Nested {
    absmax: Part,
    map: Part,
    offset: f32,
}

/// The JSON beside a four-bit weight.
#[derive(Deserialize)]
struct State {
    quant_type: String,
    blocksize: i64,
    dtype: String,
    shape: Vec<i64>,
    nested_blocksize: Option<i64>,
    nested_dtype: Option<String>,
    nested_offset: Option<f64>,
}

/// Puts codes and what belongs to them together, where `config` says that there are such; other models are left as they are.
///
/// Errors: a part that is missing, of another type or size than the codes ask for, or left over; a state that is damaged, of a number
/// type or block size that bitsandbytes does not have.
pub(super) fn pair(
    config: &Value,
    (files, opened): (&[PathBuf], &[File]),
    tensors: Vec<Stored>,
    notices: &mut Vec<String>,
) -> Result<Vec<Stored>> {
    if quantisation(config).is_none_or(|(_, found)| method(found) != Some(METHOD)) {
        return Ok(tensors);
    }
    let Some(all) = All::new((files, opened), &tensors) else { return Ok(tensors) };
    let mut forms: HashMap<String, (Vec<i64>, Parts)> = HashMap::new();
    let mut taken: HashSet<String> = HashSet::new();
    for tensor in &tensors {
        if let Some((weight, kind)) = tensor.name.split_once(STATE) {
            let (shape, parts, used) = all.four_bit(tensor, weight, kind)?;
            taken.extend(used);
            forms.insert(weight.to_string(), (shape, parts));
        } else if let Some(module) = tensor.name.strip_suffix(ROWS) {
            let weight = format!("{module}.weight");
            forms.insert(weight.clone(), all.int8(tensor, &weight)?);
            taken.extend([tensor.name.clone(), format!("{module}{FORMAT}")]);
        }
    }
    for tensor in tensors.iter().filter(|tensor| !forms.contains_key(&tensor.name) && !taken.contains(&tensor.name)) {
        let Form::Plain(dtype) = tensor.form else { unreachable!("nothing is paired before") };
        if tensor.name.ends_with(".weight") && ["U8", "I8"].contains(&dtype.name) {
            let lacks = if dtype.name == "U8" { format!("{}{STATE}nf4", tensor.name) } else { ROWS[1..].to_string() };
            let what = format!("is stored as {}, but what belongs to it ({lacks}) is missing", dtype.name);
            return Err(all.fault(tensor, what));
        }
    }
    if !forms.is_empty() {
        notices.push(format!(
            "the base holds weights quantised by bitsandbytes ({}): `adapter.method: qlora` keeps them so, another method reads them \
             as plain numbers, and a merged model is written in those",
            forms.len()
        ));
    }
    let paired = tensors.into_iter().filter(|tensor| !taken.contains(&tensor.name)).map(|mut tensor| {
        if let Some((shape, parts)) = forms.remove(&tensor.name) {
            let Form::Plain(codes) = tensor.form else { unreachable!("nothing is paired before") };
            let stored = std::mem::replace(&mut tensor.shape, shape);
            tensor.form = Form::Bitsandbytes(codes, stored, parts);
        }
        tensor
    });
    Ok(paired.collect())
}

impl All<'_> {
    /// Shape and parts of a four-bit weight, and the names of all tensors that belong to it.
    fn four_bit(&self, state: &Stored, weight: &str, kind: &str) -> Result<(Vec<i64>, Parts, Vec<String>)> {
        let Some(codes) = self.by_name.get(weight) else {
            return Err(self.fault(state, format!("belongs to {weight}, which is missing")));
        };
        let said = self.state(state)?;
        let wrong = |what: String| Err(self.fault(state, what));
        let code = match (kind, said.quant_type.as_str()) {
            ("nf4", "nf4") => FourBitType::Nf4,
            ("fp4", "fp4") => FourBitType::Fp4,
            (_, other) => {
                return wrong(format!("quant_type is {other:?}, in a tensor for {kind:?}; nf4 and fp4 are known"));
            }
        };
        if !BLOCKS.contains(&said.blocksize) {
            return wrong(format!("blocksize is {}; bitsandbytes has {BLOCKS:?}", said.blocksize));
        }
        let stored = match said.dtype.as_str() {
            "bfloat16" => Kind::BFloat16,
            "float16" => Kind::Half,
            "float32" => Kind::Float,
            other => return wrong(format!("dtype is {other:?}; bfloat16, float16 and float32 are known")),
        };
        let numbers = said.shape.iter().try_fold(1i64, |all, size| all.checked_mul(*size).filter(|_| *size > 0));
        let Some(numbers) = numbers.filter(|_| (2..=3).contains(&said.shape.len())) else {
            return wrong(format!("shape is {:?}, which is no weight's", said.shape));
        };
        let Form::Plain(dtype) = codes.form else { unreachable!("nothing is paired before") };
        let bytes = codes.shape.iter().product::<i64>() as u64 * dtype.bits / 8;
        if bytes != (numbers as u64).div_ceil(2) {
            let what = format!(
                "is {bytes} bytes, but {:?} numbers of four bits are {}",
                said.shape,
                (numbers as u64).div_ceil(2)
            );
            return Err(self.fault(codes, what));
        }
        let blocks = (numbers + said.blocksize - 1) / said.blocksize;
        let name = |end: &str| format!("{weight}.{end}");
        let mut used = vec![state.name.clone(), name("absmax"), name("quant_map")];
        self.code_book(self.part(codes, name("quant_map"), &["F32"], 16)?, code)?;
        let (absmax, nested) = match (said.nested_offset, said.nested_blocksize, said.nested_dtype.as_deref()) {
            (None, None, None) => (self.part(codes, name("absmax"), &["F32"], blocks)?, None),
            (Some(offset), Some(NESTED_BLOCK), Some("float32")) if offset.is_finite() => {
                used.extend([name("nested_absmax"), name("nested_quant_map")]);
                let nested = Nested {
                    absmax: self.part(
                        codes,
                        name("nested_absmax"),
                        &["F32"],
                        (blocks + NESTED_BLOCK - 1) / NESTED_BLOCK,
                    )?,
                    map: self.part(codes, name("nested_quant_map"), &["F32"], 256)?,
                    offset: offset as f32,
                };
                (self.part(codes, name("absmax"), &["U8"], blocks)?, Some(nested))
            }
            (offset, block, dtype) => {
                return wrong(format!(
                    "nested_offset is {offset:?}, nested_blocksize {block:?}, nested_dtype {dtype:?}; a number, {NESTED_BLOCK} and \
                     float32 expected"
                ));
            }
        };
        let block = said.blocksize;
        Ok((said.shape, Parts::FourBit { code, block, stored, absmax, nested }, used))
    }

    fn state(&self, tensor: &Stored) -> Result<State> {
        let Form::Plain(dtype) = tensor.form else { unreachable!("nothing is paired before") };
        let length = tensor.shape.iter().product::<i64>() as u64;
        if dtype.name != "U8" || length > MOST_STATE {
            let what = format!("is {} {:?}; at most {MOST_STATE} bytes of JSON expected", dtype.name, tensor.shape);
            return Err(self.fault(tensor, what));
        }
        let mut text = vec![0; length as usize];
        self.source(tensor).read(&mut text, 0)?;
        serde_json::from_slice(&text)
            .map_err(|error| self.fault(tensor, format!("is no state of bitsandbytes: {error}")))
    }

    /// The kernels of bitsandbytes have the code book built in; a file that says another one is not theirs.
    fn code_book(&self, map: Part, code: FourBitType) -> Result<()> {
        let tensor = self.by_name[map.name.as_str()];
        let found = map.tensor(self.files, self.opened, Kind::Float)?;
        let expected = Tensor::from_slice(code.values());
        if (found - expected).abs().max().double_value(&[]) > 1e-6 {
            return Err(self.fault(tensor, format!("holds another code book than that of {code}")));
        }
        Ok(())
    }

    /// Shape and parts of an eight-bit weight.
    fn int8(&self, rows: &Stored, weight: &str) -> Result<(Vec<i64>, Parts)> {
        let Some(codes) = self.by_name.get(weight) else {
            return Err(self.fault(rows, format!("belongs to {weight}, which is missing")));
        };
        let Form::Plain(dtype) = codes.form else { unreachable!("nothing is paired before") };
        if dtype.name != "I8" || codes.shape.len() != 2 {
            let what = format!("is {} {:?}; I8 (out, in) expected beside {}", dtype.name, codes.shape, rows.name);
            return Err(self.fault(codes, what));
        }
        let absmax = self.part(codes, rows.name.clone(), &["F32", "F16", "BF16"], codes.shape[0])?;
        Ok((codes.shape.clone(), Parts::Int8 { absmax }))
    }
}

impl Parts {
    /// The form it was quantised to.
    pub(in crate::weights) fn form(&self) -> quant::Form {
        match self {
            Self::FourBit { code, block, nested, .. } => {
                quant::Form::FourBit { code: *code, block: *block, double_quant: nested.is_some() }
            }
            Self::Int8 { .. } => quant::Form::Int8,
        }
    }

    /// How it lies: the number type that was quantised.
    pub(in crate::weights) fn layout_of(&self) -> Option<String> {
        match self {
            Self::FourBit { stored, .. } => Some(format!("of numbers in {}", quant::name_of(*stored))),
            Self::Int8 { .. } => None,
        }
    }

    /// Bytes that are kept beside the codes.
    pub(in crate::weights) fn bytes(&self) -> u64 {
        match self {
            Self::FourBit { absmax, nested, .. } => {
                absmax.bytes() + nested.as_ref().map_or(0, |nested| nested.absmax.bytes() + nested.map.bytes())
            }
            Self::Int8 { absmax } => absmax.bytes(),
        }
    }

    /// What the form is called.
    pub(in crate::weights) fn name(&self) -> &'static str {
        match self {
            Self::FourBit { code: FourBitType::Nf4, .. } => "NF4",
            Self::FourBit { code: FourBitType::Fp4, .. } => "FP4",
            Self::Int8 { .. } => "INT8",
        }
    }

    /// Reads the codes at `source`, stored as `dtype` in the shape `stored`, of a weight of `shape` that is made whole in `kind`.
    pub(in crate::weights) fn read(
        &self,
        source: Source,
        (dtype, packed): (&'static Dtype, &[i64]),
        shape: &[i64],
        (files, opened): (&[PathBuf], &[File]),
        (kind, device): (Kind, Device),
    ) -> Result<Quantised> {
        let own =
            dtype.kind.ok_or_else(|| source.fault(format_args!("codes of type {} are not supported", dtype.name)))?;
        let part = |part: &Part, kind| storage::place(part.tensor(files, opened, kind)?.view([-1]), device);
        match self {
            Self::FourBit { code, block, stored, absmax, nested } => {
                let bytes = packed.iter().product::<i64>() * own.elt_size_in_bytes() as i64;
                // Whatever type the bytes are stored under, they are codes: none is "not finite".
                let u8s = Dtype::of(Kind::Uint8).expect("bytes are of the format");
                let codes = storage::place(storage::read_plain(source, u8s, &[bytes], Kind::Uint8)?, device)?;
                let absmax = match nested {
                    None => Absmax::Plain(part(absmax, Kind::Float)?),
                    Some(nested) => Absmax::Nested {
                        codes: part(absmax, Kind::Uint8)?,
                        absmax: part(&nested.absmax, Kind::Float)?,
                        offset: nested.offset,
                        map: part(&nested.map, Kind::Float)?,
                    },
                };
                let (code, block, shape) = (*code, *block, shape.to_vec());
                Ok(Quantised::FourBit(FourBit { code, block, shape, stored: *stored, kind, codes, absmax }))
            }
            Self::Int8 { absmax } => {
                let codes = storage::place(storage::read_plain(source, dtype, shape, Kind::Int8)?, device)?;
                let absmax = part(absmax, Kind::Float)?;
                Ok(Quantised::Int8(Int8 { shape: shape.to_vec(), kind, codes, absmax }))
            }
        }
    }
}

#[cfg(test)]
mod tests;
