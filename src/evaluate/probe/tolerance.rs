//! How far the numbers of one and the same model may be apart when they are stored, or computed with, in another form.

use serde::{Deserialize, Serialize};

/// How far apart logits may be, in standard deviations of the logits at their place.
///
/// Rounding a weight makes it wrong by a part `u` of its size (the root of the mean square), independently of the others, so a
/// product `W x` is wrong by the same part `u`. A logit comes out of a stream that sums the blocks' products and is read by each
/// later block: its errors come from the products that made it and from those that read it wrongly, and add up as independent
/// ones do. How many `u` that comes to is the model's: of SmolLM2-135M (30 layers, answers to four prompts, teacher-forced in
/// transformers) the root of the mean square over places and the twenty likeliest tokens is 8 `u` where weights are made wrong at
/// random by any `u` from 1.6e-3 to 8.4e-2, 6 in bf16 and 11 in `q8_0`; of a single prompt up to 13. Of random models of two layers it
/// is 5 to 9. [`TYPICAL`] allows sixteen. What is rounded coarsely differs by less than that: `q4_0` of SmolLM2-135M by 0.74, of a
/// single prompt by 1.02, while an unrelated model is as far as the root of 2, which [`MOST`] keeps every form below. The largest of
/// some thousand such numbers is some five times as large, and more where an activation stands out ([`LARGEST`]). Where several
/// roundings come together (weights in one form, products in another), their squares add up.
///
/// `u` of the forms ([`FORMATS`]), for weights that are normal to begin with:
///
/// | Form | Why | u |
/// |---|---|---|
/// | `f32` | sums of K terms in another order: 2^-24 sqrt(K), K = 4096 | 4e-6 |
/// | `f16` | 11 bits: uniform within 2^-12 to 2^-11 of the number | 2.0e-4 |
/// | `bf16` | 8 bits: within 2^-9 to 2^-8 | 1.6e-3 |
/// | `computed in f16`, `computed in bf16` | what goes into a product, what comes out, and the stream it is added to: nine roundings' squares, as measured on the same model | 6.0e-4, 4.8e-3 |
/// | `q8_0` | steps of max/127 to a block of 32, whose max is 2.3 deviations: 2.3/127/sqrt(12) | 5.4e-3 |
/// | `int8` | the same for rows of thousands, max 4 | 9.1e-3 |
/// | `q6_k` | blocks of 16, max 2.2, steps of max/32 | 2.0e-2 |
/// | `fp8` | 4 bits: within 2^-5 to 2^-4 | 2.6e-2 |
/// | `q5_1`, `q5_k_m`, `q5_k_s` | range 4.1 in 31 steps | 3.8e-2 |
/// | `q5_0` | max 2.3 in 16 steps | 4.2e-2 |
/// | `q4_1`, `q4_k_m`, `q4_k_s` | range 4.1 in 15 steps | 7.9e-2 |
/// | `q4_0` | max 2.3 in 8 steps | 8.4e-2 |
/// | `nf4` | 16 quantiles to a block of 64 | 9.6e-2 |
/// | `fp4` | 8 magnitudes to a block of 64 | 1.3e-1 |
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Tolerance {
    /// The forms that come together: of the weights, and of what was computed with.
    pub formats: Vec<String>,
    /// Most that the root of the mean square over the places and tokens of a probe may be.
    pub mean: f64,
    /// Most that any one may be.
    pub largest: f64,
}

/// What the root of the mean square may be, in `u`, as long as that is small.
const TYPICAL: f64 = 16.0;
/// What it comes near where that is large, in spreads.
const MOST: f64 = 1.8;
/// What the largest number may be, in what the root of the mean square may be.
const LARGEST: f64 = 8.0;

const COMPUTED_IN_F16: &str = "computed in f16";
const COMPUTED_IN_BF16: &str = "computed in bf16";

/// The forms, and the part of itself that a number in them is wrong by: [`Tolerance`] says why.
pub const FORMATS: &[(&str, f64)] = &[
    ("f32", 4e-6),
    ("f16", 2.0e-4),
    ("bf16", 1.6e-3),
    (COMPUTED_IN_F16, 6.0e-4),
    (COMPUTED_IN_BF16, 4.8e-3),
    ("q8_0", 5.4e-3),
    ("int8", 9.1e-3),
    ("q6_k", 2.0e-2),
    ("fp8", 2.6e-2),
    ("q5_1", 3.8e-2),
    ("q5_k_m", 3.8e-2),
    ("q5_k_s", 3.8e-2),
    ("q5_0", 4.2e-2),
    ("q4_1", 7.9e-2),
    ("q4_k_m", 7.9e-2),
    ("q4_k_s", 7.9e-2),
    ("q4_0", 8.4e-2),
    ("nf4", 9.6e-2),
    ("fp4", 1.3e-1),
];

impl Tolerance {
    /// Where these forms come together; `fp32` and `fp16` are other names of `f32` and `f16`. `None` where one is not known.
    pub fn of(formats: &[&str]) -> Option<Self> {
        let plain = |name: &str| match name.to_lowercase().as_str() {
            "fp32" | "float32" => "f32".to_string(),
            "fp16" | "float16" | "half" => "f16".to_string(),
            "bfloat16" => "bf16".to_string(),
            name => name.to_string(),
        };
        let mut names: Vec<String> = formats.iter().map(|name| plain(name)).collect();
        names.sort();
        names.dedup();
        let squares = names.iter().map(|name| {
            let (_, u) = FORMATS.iter().find(|(known, _)| known == name)?;
            Some(u * u)
        });
        let u = squares.sum::<Option<f64>>()?.sqrt();
        // Near the first where that is small, near the second where it is large.
        let mean = TYPICAL * u / (1.0 + (TYPICAL * u / MOST).powi(2)).sqrt();
        Some(Self { formats: names, mean, largest: LARGEST * mean })
    }

    /// The form by which products and sums differ that are computed in a number type (`bf16`, `fp32`), weights apart.
    pub fn computed_in(dtype: &str) -> &'static str {
        match dtype {
            "bf16" | "bfloat16" => COMPUTED_IN_BF16,
            "f16" | "fp16" | "float16" | "half" => COMPUTED_IN_F16,
            _ => "f32",
        }
    }

    /// This one, where one more form comes in.
    #[must_use]
    pub fn and(&self, format: &str) -> Self {
        let formats: Vec<&str> = self.formats.iter().map(String::as_str).chain([format]).collect();
        Self::of(&formats).unwrap_or_else(|| self.clone())
    }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::quant::{Form, FourBitType, Products, Scheme};
    use crate::torch_ext::uniform;
    use crate::weights::gguf::{Conversion, Quantisation, quantise};

    /// What was measured on SmolLM2-135M, of the worst of four prompts: what a real model does is allowed.
    #[test]
    fn real_models_are_within_what_is_allowed() {
        for (forms, mean, largest) in [
            (&["f16"][..], 1.6e-3, 6.9e-3),
            (&["bf16"], 1.3e-2, 5.7e-2),
            (&["bf16", "computed in bf16"], 6.9e-2, 3.7e-1),
            (&["q8_0"], 6.6e-2, 2.4e-1),
            (&["q4_0"], 1.02, 5.6),
        ] {
            let allowed = Tolerance::of(forms).unwrap();
            assert!(mean < allowed.mean && largest < allowed.largest, "{allowed:?}");
            // And not so much more that it says nothing.
            assert!(allowed.mean < 2.5 * mean, "{allowed:?}");
        }
        assert_eq!(Tolerance::computed_in("bf16"), "computed in bf16");
        assert_eq!(Tolerance::computed_in("fp32"), "f32");
    }

    #[test]
    fn forms_come_together_by_their_squares() {
        let [one, other] = ["bf16", "q8_0"].map(|name| Tolerance::of(&[name]).unwrap());
        let both = Tolerance::of(&["q8_0", "bf16", "bf16"]).unwrap();
        assert!((both.mean / one.mean.hypot(other.mean) - 1.0).abs() < 0.01);
        let most = FORMATS.iter().map(|(name, _)| Tolerance::of(&[name]).unwrap().mean).fold(0.0, f64::max);
        // An unrelated model is as far as the root of 2.
        assert!((0.5..std::f64::consts::SQRT_2).contains(&most), "{most}");
        assert_eq!(both.formats, ["bf16", "q8_0"]);
        assert_eq!(one.and("q8_0"), both);
        assert_eq!(Tolerance::of(&["fp32"]), Tolerance::of(&["f32"]));
        assert_eq!(Tolerance::of(&["q9"]), None);
    }

    /// Sums of uniform numbers are as good as normal.
    fn normal() -> Tensor {
        let like = Tensor::zeros([256, 1024], (Kind::Float, Device::Cpu));
        (0..12).map(|seed| uniform(&like, -0.5, 0.5, seed)).reduce(|sum, part| sum + part).unwrap()
    }

    #[test]
    fn the_table_says_how_wrong_numbers_are() {
        let weight = normal();
        let wrong = |stored: &Tensor| {
            let apart = (stored.to_kind(Kind::Float) - &weight).pow_tensor_scalar(2).mean(Kind::Float);
            (apart / weight.pow_tensor_scalar(2).mean(Kind::Float)).sqrt().double_value(&[])
        };
        let kept = |form| {
            let scheme =
                Scheme { form, kind: Kind::Float, skip: vec![], products: Products::Dequantised, after_start: false };
            scheme.numbers(&weight)
        };
        let blocks = |name: &str| {
            let format = Quantisation::called(name);
            let bytes = quantise(&weight, format, Conversion::Same, "w").unwrap();
            let mut numbers = vec![0f32; weight.numel()];
            format.dequantise.unwrap()(&bytes, &mut numbers);
            Tensor::from_slice(&numbers).reshape(weight.size())
        };
        let four = |code| Form::FourBit { code, block: 64, double_quant: false };
        for (name, stored) in [
            ("f16", weight.to_kind(Kind::Half)),
            ("bf16", weight.to_kind(Kind::BFloat16)),
            ("int8", kept(Form::Int8)),
            ("fp8", kept(Form::Fp8)),
            ("nf4", kept(four(FourBitType::Nf4))),
            ("fp4", kept(four(FourBitType::Fp4))),
            ("q8_0", blocks("Q8_0")),
            ("q6_k", blocks("Q6_K")),
            ("q5_0", blocks("Q5_0")),
            ("q5_1", blocks("Q5_1")),
            // Most weights of these mixtures; the rest has more bits.
            ("q5_k_m", blocks("Q5_K")),
            ("q5_k_s", blocks("Q5_K")),
            ("q4_0", blocks("Q4_0")),
            ("q4_1", blocks("Q4_1")),
            ("q4_k_m", blocks("Q4_K")),
            ("q4_k_s", blocks("Q4_K")),
        ] {
            let said = FORMATS.iter().find(|(known, _)| *known == name).unwrap().1;
            let found = wrong(&stored);
            assert!((0.75..1.35).contains(&(found / said)), "{name}: {found} was found, the table has {said}");
        }
    }
}
