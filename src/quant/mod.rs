//! NF4, FP4, int8, fp8: quantise, dequantise, stored forms.

pub mod dynamic;
