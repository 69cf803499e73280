//! How a base is quantised while it is loaded.

use std::fmt;

use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::four_bit::NESTED_BLOCK;
use super::{Digest, FourBit, FourBitType, Fp8, Int8, Quantised, Weight};
use crate::{Error, Fault, Result};

/// The first number that fp16 rounds to infinity.
const FIRST_BEYOND_HALF: f64 = 65_520.0;

/// What becomes of the weights of linears, and of which.
#[derive(Debug, Clone, PartialEq)]
pub struct Scheme {
    /// The form.
    pub form: Form,
    /// The number type that weights are read in before they are quantised, and made whole in.
    pub kind: Kind,
    /// Modules that stay as they are: those whose path is such a name or ends in `.name`.
    pub skip: Vec<String>,
    /// What products with the weights read.
    pub products: Products,
    /// Whether what adapters started with was taken off the weights before they were quantised (PiSSA, OLoRA).
    pub after_start: bool,
}

/// What products with a quantised weight read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Products {
    /// Its numbers, made whole for each product.
    Dequantised,
    /// Its numbers, made whole at once and kept so: the same, in more memory and less time.
    Cached,
    /// Its fp8 codes themselves ([`Fp8::product`]); experts' weights are made whole.
    Fp8,
}

/// A form to quantise to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// [`FourBit`].
    FourBit {
        /// What codes stand for.
        code: FourBitType,
        /// Numbers to a block.
        block: i64,
        /// Whether the blocks' magnitudes are quantised, too.
        double_quant: bool,
    },
    /// [`Int8`].
    Int8,
    /// [`Fp8`] of e4m3fn, a scale to each row.
    Fp8,
    /// What another tool made: it is kept, and cannot be made of other numbers.
    Stored(Layout),
}

/// How another tool stores quantised weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// GPTQ's integers.
    Gptq,
    /// AWQ's integers.
    Awq,
    /// What compressed-tensors stores.
    CompressedTensors,
    /// fp8 with scales to blocks or to the whole weight.
    Fp8,
    /// [`super::Mxfp4`].
    Mxfp4,
}

impl Layout {
    const ALL: [Self; 5] = [Self::Gptq, Self::Awq, Self::CompressedTensors, Self::Fp8, Self::Mxfp4];
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gptq => "gptq",
            Self::Awq => "awq",
            Self::CompressedTensors => "compressed-tensors",
            Self::Fp8 => "stored fp8",
            Self::Mxfp4 => "mxfp4",
        })
    }
}

impl fmt::Display for Form {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FourBit { code, block, double_quant } => {
                let scales = if *double_quant { "with quantised scales" } else { "with scales in fp32" };
                write!(f, "{code} in blocks of {block} {scales}")
            }
            Self::Int8 => f.write_str("int8"),
            Self::Fp8 => f.write_str("fp8 with a scale to each row"),
            Self::Stored(layout) => layout.fmt(f),
        }
    }
}

impl Form {
    /// Whether dense numbers can be quantised to it.
    pub fn can_be_made(self) -> bool {
        !matches!(self, Self::Stored(_))
    }

    /// Bytes of a weight (out, in), or of all experts' (E, out, in), that was made so; `None` for what another tool made, which its
    /// file tells.
    pub fn bytes(self, shape: &[i64]) -> Option<u64> {
        let &[ref experts @ .., rows, columns] = shape else { return Some(shape.iter().product::<i64>() as u64) };
        let numbers = (rows * columns) as u64;
        let of_one = match self {
            Self::FourBit { block, double_quant, .. } => {
                let blocks = numbers.div_ceil(block as u64);
                // What the codes of the scales stand for is kept with each weight.
                let map = 4 * 256;
                let scales =
                    if double_quant { blocks + 4 * blocks.div_ceil(NESTED_BLOCK as u64) + map } else { 4 * blocks };
                numbers.div_ceil(2) + scales
            }
            Self::Int8 | Self::Fp8 => numbers + 4 * rows as u64,
            Self::Stored(_) => return None,
        };
        Some(experts.iter().product::<i64>() as u64 * of_one)
    }

    /// Refuses a weight with numbers that this form cannot hold: integers of eight bits are made of fp16 numbers.
    ///
    /// # Errors
    /// [`Error::Model`], with the number and `name`.
    pub fn holds(self, name: &str, weight: &Tensor) -> Result<()> {
        if self != Self::Int8 || weight.numel() == 0 {
            return Ok(());
        }
        // Without a copy of their magnitudes, which would be a second whole tensor.
        let [most, least] = [weight.max(), weight.min()].map(|number| number.double_value(&[]));
        if most < FIRST_BEYOND_HALF && -least < FIRST_BEYOND_HALF {
            return Ok(());
        }
        let largest = if most < FIRST_BEYOND_HALF { least } else { most };
        let fault = Fault::new(name, format!("holds {largest}, but int8 is made of fp16 numbers, which end at 65504"));
        Err(Error::Model(fault.hint("quantise it to nf4 or fp8, or name its module in `quantization.skip`")))
    }

    /// Whether a base that is stored so may be quantised to `asked`: to fewer bits, at least.
    pub fn may_become(self, asked: Self) -> bool {
        let eight = matches!(self, Self::Stored(Layout::Fp8));
        self == asked || (eight && matches!(asked, Self::FourBit { .. } | Self::Int8 | Self::Fp8))
    }
}

impl fmt::Display for Scheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, of numbers in {}", self.form, name_of(self.kind))?;
        if self.skip.is_empty() { Ok(()) } else { write!(f, ", all but {}", self.skip.join(", ")) }
    }
}

impl Scheme {
    /// What a recipe says to ask for it, of a base that is stored so where it cannot be made.
    pub fn in_recipe(&self) -> String {
        let Said { r#type: form, double_quant, block_size, skip, dtype, .. } = Said::from(self);
        let (form, skip) =
            (if self.form.can_be_made() { format!("type: {form}, ") } else { String::new() }, skip.join(", "));
        let blocks = double_quant.zip(block_size);
        let blocks = blocks.map(|(double, block)| format!("double_quant: {double}, block_size: {block}, "));
        let blocks = blocks.unwrap_or_default();
        format!("dtype: {dtype}, adapter: {{method: qlora}}, quantization: {{{form}{blocks}skip: [{skip}]}}")
    }

    /// Whether a module stays as it is.
    pub fn skips(&self, module: &str) -> bool {
        self.skip.iter().any(|name| ends_in(module, name))
    }

    /// A weight (out, in), or (E, out, in) whose experts are quantised one by one, as this keeps it for products in `kind`;
    /// with its fingerprint.
    pub fn keep(&self, weight: &Tensor, kind: Kind) -> (Weight, Digest) {
        self.store(self.quantised(&weight.to_kind(self.kind)), kind)
    }

    /// A weight that is quantised already, to be made whole in the scheme's type, as this keeps it for products in `kind`. Those of
    /// another type than the scheme's read plain numbers, which are still the scheme's. With its fingerprint.
    pub fn store(&self, quantised: Quantised, kind: Kind) -> (Weight, Digest) {
        let digest = quantised.digest();
        let weight = match (self.products, quantised) {
            (_, quantised) if kind != self.kind => Weight::Dense(quantised.dequantised().to_kind(kind)),
            (Products::Cached, quantised) => Weight::Dense(quantised.dequantised()),
            (Products::Fp8, Quantised::Fp8(weight)) => {
                Weight::from(Quantised::Fp8(Fp8 { multiplied: weight.has_rows(), ..weight }))
            }
            (Products::Fp8 | Products::Dequantised, quantised) => Weight::from(quantised),
        };
        (weight, digest)
    }

    /// The numbers that a weight, (out, in) or (E, out, in), stands for once it is quantised, in the scheme's type.
    pub fn numbers(&self, weight: &Tensor) -> Tensor {
        self.quantised(&weight.to_kind(self.kind)).dequantised()
    }

    /// A weight of numbers in the scheme's type, quantised: (out, in), or (E, out, in) whose experts are quantised one by one.
    pub fn quantised(&self, weight: &Tensor) -> Quantised {
        if weight.dim() == 3 {
            return Quantised::Experts(weight.unbind(0).iter().map(|expert| self.quantised(expert)).collect());
        }
        match self.form {
            Form::FourBit { code, block, double_quant } => {
                Quantised::FourBit(FourBit::of(weight, code, block, double_quant))
            }
            Form::Int8 => Quantised::Int8(Int8::of(weight)),
            Form::Fp8 => Quantised::Fp8(Fp8::of(weight)),
            Form::Stored(layout) => unreachable!("{layout} is kept where it is stored, never made"),
        }
    }

    /// As JSON, for the folder of an adapter that was trained so.
    pub fn to_json(&self) -> String {
        format!("{:#}\n", self.to_value())
    }

    /// As JSON, for a manifest.
    pub fn to_value(&self) -> serde_json::Value {
        serde_json::to_value(Said::from(self)).expect("names, numbers and flags have a JSON form")
    }

    /// Of its JSON.
    ///
    /// # Errors
    /// What is wrong with it, in a sentence.
    pub fn from_json(text: &[u8]) -> std::result::Result<Self, String> {
        let said: Said = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        Self::try_from(said)
    }
}

/// Whether the path of a module is `name`, or ends in `.name`.
pub fn ends_in(module: &str, name: &str) -> bool {
    module.strip_suffix(name).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// A scheme as its file says it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Said {
    r#type: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    double_quant: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    block_size: Option<i64>,
    skip: Vec<String>,
    dtype: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    after_start: bool,
}

const KINDS: [(&str, Kind); 3] = [("bf16", Kind::BFloat16), ("fp16", Kind::Half), ("fp32", Kind::Float)];

/// What a recipe calls a number type of weights.
pub fn name_of(kind: Kind) -> &'static str {
    KINDS.iter().find(|(_, known)| *known == kind).map_or("fp32", |(name, _)| *name)
}

impl From<&Scheme> for Said {
    fn from(scheme: &Scheme) -> Self {
        let (r#type, double_quant, block_size) = match scheme.form {
            Form::FourBit { code, block, double_quant } => (code.to_string(), Some(double_quant), Some(block)),
            Form::Int8 => ("int8".into(), None, None),
            Form::Fp8 => ("fp8".into(), None, None),
            Form::Stored(layout) => (layout.to_string(), None, None),
        };
        Self {
            r#type,
            double_quant,
            block_size,
            skip: scheme.skip.clone(),
            dtype: name_of(scheme.kind).into(),
            after_start: scheme.after_start,
        }
    }
}

impl TryFrom<Said> for Scheme {
    type Error = String;

    fn try_from(said: Said) -> std::result::Result<Self, String> {
        let four_bit = |code| {
            let block = said.block_size.ok_or("block_size is missing")?;
            if !super::four_bit::BLOCKS.contains(&block) {
                return Err(format!("block_size is {block}, not one of {:?}", super::four_bit::BLOCKS));
            }
            Ok(Form::FourBit { code, block, double_quant: said.double_quant.ok_or("double_quant is missing")? })
        };
        let form = match said.r#type.as_str() {
            "nf4" => four_bit(FourBitType::Nf4)?,
            "fp4" => four_bit(FourBitType::Fp4)?,
            "int8" => Form::Int8,
            "fp8" => Form::Fp8,
            other => match Layout::ALL.into_iter().find(|layout| layout.to_string() == other) {
                Some(layout) => Form::Stored(layout),
                None => {
                    let stored = Layout::ALL.map(|layout| layout.to_string()).join(", ");
                    return Err(format!("type is {other:?}, not nf4, fp4, int8, fp8, {stored}"));
                }
            },
        };
        let kind = KINDS.iter().find(|(name, _)| *name == said.dtype);
        let (_, kind) = kind.ok_or_else(|| format!("dtype is {:?}, not bf16, fp16 or fp32", said.dtype))?;
        Ok(Self { form, kind: *kind, skip: said.skip, products: Products::Dequantised, after_start: said.after_start })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scheme(form: Form) -> Scheme {
        Scheme {
            form,
            kind: Kind::BFloat16,
            skip: vec!["lm_head".to_string(), "mlp.gate".to_string()],
            products: Products::Dequantised,
            after_start: false,
        }
    }

    #[test]
    fn what_int8_cannot_hold_is_refused_and_other_forms_hold_it() {
        let weight = |largest: f64| Tensor::from_slice(&[1.0, -largest, 0.5, 2.0]).to_kind(Kind::Float).view([2, 2]);
        let nf4 = Form::FourBit { code: FourBitType::Nf4, block: 64, double_quant: true };
        for form in [nf4, Form::Fp8] {
            assert!(form.holds("q_proj", &weight(1e6)).is_ok());
        }
        assert!(Form::Int8.holds("q_proj", &weight(65_519.0)).is_ok());
        assert!(Int8::of(&weight(65_519.0)).dequantised().isfinite().all().int64_value(&[]) == 1);
        assert!(Int8::of(&weight(65_520.0)).dequantised().isfinite().all().int64_value(&[]) == 0);
        let error = Form::Int8.holds("q_proj", &weight(65_520.0)).unwrap_err().to_string();
        assert!(error.contains("q_proj") && error.contains("65520") && error.contains("65504"), "{error}");
    }

    #[test]
    fn a_name_is_skipped_at_a_dot_only() {
        for (module, skipped) in [
            ("lm_head", true),
            ("model.lm_head", true),
            ("model.layers.0.mlp.gate", true),
            ("model.layers.0.mlp.gate_proj", false),
            ("my_lm_head", false),
        ] {
            assert_eq!(scheme(Form::Int8).skips(module), skipped, "{module}");
        }
    }

    #[test]
    fn a_scheme_says_what_it_is_to_people_and_to_recipes() {
        let one = scheme(Form::FourBit { code: FourBitType::Nf4, block: 64, double_quant: true });
        assert_eq!(
            one.to_string(),
            "nf4 in blocks of 64 with quantised scales, of numbers in bf16, all but lm_head, mlp.gate"
        );
        assert_eq!(
            one.in_recipe(),
            "dtype: bf16, adapter: {method: qlora}, quantization: {type: nf4, double_quant: true, block_size: 64, \
             skip: [lm_head, mlp.gate]}"
        );
    }

    #[test]
    fn what_is_written_is_read_again_and_nonsense_is_not() {
        let four_bit = Form::FourBit { code: FourBitType::Fp4, block: 128, double_quant: false };
        for form in [four_bit, Form::Int8, Form::Fp8].into_iter().chain(Layout::ALL.map(Form::Stored)) {
            assert_eq!(Scheme::from_json(scheme(form).to_json().as_bytes()).unwrap(), scheme(form));
        }
        let error = |text: &str| Scheme::from_json(text.as_bytes()).unwrap_err();
        let of = |rest: &str| error(&format!(r#"{{"type":"nf4","skip":[],"dtype":"bf16"{rest}}}"#));
        assert!(of("").contains("block_size is missing"));
        assert!(of(r#","block_size":63,"double_quant":true"#).contains("block_size is 63"));
        assert!(of(r#","x":1"#).contains("unknown field"));
        assert!(error(r#"{"type":"nf5","skip":[],"dtype":"bf16"}"#).contains("nf5"));
    }
}
