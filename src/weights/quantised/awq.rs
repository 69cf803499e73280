//! Weights as AWQ's tools store them (AutoAWQ 0.2.9).
//!
//! `quantization_config {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}`. `X.qweight` (in, out / 8) I32 holds
//! eight neighbours of a row in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on, `X.qzeros` (groups, out / 8) the codes that
//! stand for zero in the same way, `X.scales` (groups, out) the scales. Version `gemv`: `X.qweight` (out, in / 8), `X.qzeros`
//! (out, groups / 8) and `X.scales` (out, groups), rows from the lowest bits on, both filled up to whole words (of 32 and 64 numbers, to
//! four and two). A checkpoint shows `X.weight` (out, in).

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::path::PathBuf;

use serde_json::Value;

use super::grouped::{Lies, Parts, SCALES, WORD};
use super::parts::{All, Part, dtype};
use super::{method, quantisation, wrong};
use crate::Result;
use crate::quant::Layout;
use crate::weights::Stored;

/// Its `quant_method`.
pub(super) const METHOD: &str = "awq";
/// After the name of a module: its codes.
const CODES: &str = ".qweight";
const OTHERS: [&str; 2] = [".qzeros", ".scales"];
/// Bits of a code, and codes of a word.
const BITS: u32 = 4;
const IN_WORD: i64 = WORD / BITS as i64;

/// Puts codes and what belongs to them together, where `config` says that there are such.
///
/// Errors: a config that asks for what is not read; a part that is missing, of another type or shape than the codes and the config ask
/// for, or left over.
pub(super) fn pair(
    config: &Value,
    (files, opened): (&[PathBuf], &[File]),
    tensors: Vec<Stored>,
    notices: &mut Vec<String>,
) -> Result<Vec<Stored>> {
    let Some((place, found)) = quantisation(config).filter(|(_, found)| method(found) == Some(METHOD)) else {
        return Ok(tensors);
    };
    let (group, rows) = read(place, found)?;
    let Some(all) = All::new((files, opened), &tensors) else { return Ok(tensors) };
    let mut forms: HashMap<String, (Vec<i64>, Parts)> = HashMap::new();
    let mut taken: HashSet<String> = HashSet::new();
    for tensor in &tensors {
        let Some(module) = tensor.name.strip_suffix(CODES) else { continue };
        if all.find(&format!("{module}.weight")).is_some() {
            return Err(all.fault(tensor, format!("{module}.weight is there as plain numbers, too")));
        }
        let own = if rows { of_rows(&all, tensor, module, group) } else { interleaved(&all, tensor, module, group) };
        forms.insert(tensor.name.clone(), own?);
        taken.extend(OTHERS.map(|end| format!("{module}{end}")));
    }
    super::refuse_left_over(&all, &tensors, &taken, &OTHERS, CODES)?;
    super::say_kept(notices, "quantised by AWQ", forms.len());
    Ok(super::shown(tensors, forms, &taken, &HashSet::new(), CODES))
}

/// The size of groups, and whether codes lie in rows.
fn read(place: &str, found: &Value) -> Result<(i64, bool)> {
    let said = |names: [&'static str; 2]| {
        names.into_iter().find_map(|name| Some((name, found.get(name).filter(|value| !value.is_null())?)))
    };
    if let Some((name, bits)) = said(["bits", "w_bit"]).filter(|(_, bits)| bits.as_u64() != Some(u64::from(BITS))) {
        return Err(wrong(place, name, bits, "4"));
    }
    let group = super::group_size(place, said(["group_size", "q_group_size"]), 128)?;
    let rows = match said(["version", "format"]) {
        None => false,
        Some((name, value)) => match value.as_str().map(str::to_lowercase).as_deref() {
            Some("gemm") => false,
            Some("gemv") => true,
            _ => return Err(wrong(place, name, value, "\"gemm\" or \"gemv\"")),
        },
    };
    Ok((group, rows))
}

/// Shape and parts of a module's weight in the layout for matrix products.
fn interleaved(all: &All, codes: &Stored, module: &str, group: i64) -> Result<(Vec<i64>, Parts)> {
    let (columns, words) = matrix(all, codes, "(in, out / 8), in even")?;
    if columns % 2 != 0 {
        return Err(all.fault(codes, format!("is {:?}; (in, out / 8), in even, expected", codes.shape)));
    }
    let (group, groups, why) = groups(columns, group);
    let scales = all.shaped(codes, &format!("{module}.scales"), &SCALES, &[groups, words * IN_WORD], &why)?;
    let zeros = all.shaped(codes, &format!("{module}.qzeros"), &["I32"], &[groups, words], &why)?;
    Ok((vec![words * IN_WORD, columns], made(Lies::Interleaved, group, codes, scales, zeros)))
}

/// Shape and parts of a module's weight in the layout for products with a vector.
fn of_rows(all: &All, codes: &Stored, module: &str, group: i64) -> Result<(Vec<i64>, Parts)> {
    let (rows, words) = matrix(all, codes, "(out, in / 8)")?;
    let columns = words * IN_WORD;
    let (group, groups, why) = groups(columns, group);
    let together = match group {
        32 => 4,
        64 => 2,
        _ => 1,
    };
    let across = (groups + IN_WORD - 1) / IN_WORD;
    let across = (across + together - 1) / together * together;
    let scales = all.shaped(codes, &format!("{module}.scales"), &SCALES, &[rows, across * IN_WORD], &why)?;
    let zeros = all.shaped(codes, &format!("{module}.qzeros"), &["I32"], &[rows, across], &why)?;
    Ok((vec![rows, columns], made(Lies::Rows, group, codes, scales, zeros)))
}

fn matrix(all: &All, codes: &Stored, expected: &str) -> Result<(i64, i64)> {
    match codes.shape[..] {
        [high, wide] if dtype(codes).name == "I32" && high * wide > 0 => Ok((high, wide)),
        _ => {
            let what = format!("is {} {:?}; I32 {expected} expected", dtype(codes).name, codes.shape);
            Err(all.fault(codes, what))
        }
    }
}

/// The size of groups, how many there are, and why.
fn groups(columns: i64, group: i64) -> (i64, i64, String) {
    let group = if group == -1 { columns } else { group };
    (group, (columns + group - 1) / group, format!("4 bits in groups of {group}"))
}

fn made(lies: Lies, group: i64, codes: &Stored, scales: Part, zeros: Part) -> Parts {
    let (codes, zeros) = (Part::of(codes), Some(zeros));
    Parts { layout: Layout::Awq, lies, bits: BITS, group, codes, scales, zeros, order: None }
}

#[cfg(test)]
mod tests;
