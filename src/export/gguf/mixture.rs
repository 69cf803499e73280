//! Which number format each tensor of a file gets: the rules of llama.cpp's `llama_tensor_get_type` and its converter, so that a file
//! is what `llama-quantize` would make of it.

use super::FileType;
use crate::weights::gguf::Quantisation;

/// What the rules ask about a model.
pub(super) struct Model<'a> {
    pub architecture: &'a str,
    /// Blocks.
    pub layers: usize,
    /// Experts of a block; 0 for none.
    pub experts: i64,
    /// Query and key heads.
    pub heads: (i64, i64),
}

impl Model<'_> {
    fn is_falcon(&self) -> bool {
        self.architecture == "falcon"
    }

    /// Whose values are so small beside its queries that better ones cost nothing.
    fn is_70b(&self) -> bool {
        let shared_keys = self.heads.0 != self.heads.1;
        self.layers == 80 && ((self.architecture == "llama" && shared_keys) || self.architecture == "qwen2")
    }
}

/// What a tensor is for, as far as the rules go by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Output,
    Embedding,
    Values,
    Keys,
    AttentionOutput,
    Down,
    Other,
}

impl Use {
    fn of(name: &str) -> Self {
        let part = |parts: &[&str]| parts.iter().any(|part| name.contains(part));
        match name {
            "output.weight" => Self::Output,
            "token_embd.weight" => Self::Embedding,
            _ if part(&["attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight"]) => Self::Values,
            _ if part(&["attn_k.weight"]) => Self::Keys,
            _ if part(&["attn_output.weight"]) => Self::AttentionOutput,
            _ if part(&["ffn_down"]) => Self::Down,
            _ => Self::Other,
        }
    }
}

/// The format of each tensor, given by GGUF name and shape (slowest dimension first); and how many could not have theirs, because their
/// rows are no whole blocks of it.
pub(super) fn formats(
    file_type: FileType,
    tensors: &[(String, Vec<i64>)],
    model: &Model,
) -> (Vec<&'static Quantisation>, usize) {
    let usual = file_type.format();
    let tied = !tensors.iter().any(|(name, _)| name == "output.weight");
    let all_values = tensors.iter().filter(|(name, _)| Use::of(name) == Use::Values).count();
    let (mut values, mut downs, mut fallen_back) = (0, 0, 0);
    let mut formats = vec![Quantisation::called("F32"); tensors.len()];
    // Block by block, by name within each: in this order are they counted.
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&index| (layer(&tensors[index].0), &tensors[index].0));
    for index in order {
        let (name, shape) = &tensors[index];
        if !is_quantised(name, shape) {
            continue;
        }
        if usual.values == 1 {
            formats[index] = usual;
            continue;
        }
        let columns = shape.last().copied().unwrap_or(1) as usize;
        let role = Use::of(name);
        let mixed = matches!(file_type, FileType::Q4KM | FileType::Q5KM);
        let mut chosen = usual.name;
        match role {
            Use::Embedding if !tied => {}
            Use::Output | Use::Embedding => {
                if model.is_falcon() || !columns.is_multiple_of(usual.values) {
                    chosen = "Q8_0";
                } else if chosen != "Q8_0" {
                    chosen = "Q6_K";
                }
            }
            Use::Values => {
                if mixed && wants_more(values, all_values) {
                    chosen = "Q6_K";
                }
                if model.is_70b() && chosen == "Q4_K" {
                    chosen = "Q5_K";
                }
                if model.experts == 8 {
                    chosen = "Q8_0";
                }
                values += 1;
            }
            Use::Keys if model.experts == 8 => chosen = "Q8_0",
            Use::Down => {
                // Of experts and those beside them, the block's number counts.
                let own = if model.experts > 1 { layer(name).map_or(downs, |layer| layer as usize) } else { downs };
                let more = wants_more(own, model.layers);
                match file_type {
                    FileType::Q4KM if model.is_falcon() && own < model.layers / 16 => chosen = "Q6_K",
                    FileType::Q4KM if model.is_falcon() && more => chosen = "Q5_K",
                    FileType::Q4KM if model.is_falcon() => {}
                    FileType::Q4KM | FileType::Q5KM if more => chosen = "Q6_K",
                    _ => {}
                }
                downs += 1;
            }
            Use::AttentionOutput if model.experts == 8 && !model.is_falcon() && file_type == FileType::Q4KM => {
                chosen = "Q5_K";
            }
            Use::Keys | Use::AttentionOutput | Use::Other => {}
        }
        let fitting = fitting(Quantisation::called(chosen), columns);
        fallen_back += usize::from(fitting.name != chosen);
        formats[index] = fitting;
    }
    (formats, fallen_back)
}

/// The number of a tensor's block; none of those outside.
fn layer(name: &str) -> Option<u32> {
    name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
}

/// The first and the last eighth, and every third between.
fn wants_more(index: usize, count: usize) -> bool {
    index < count / 8 || index >= 7 * count / 8 || (index - count / 8) % 3 == 2
}

/// Norms, biases, and what chooses experts stay as they are.
fn is_quantised(name: &str, shape: &[i64]) -> bool {
    let rows = shape.iter().rev().skip(1).any(|&size| size > 1);
    rows && name.ends_with(".weight") && !name.contains("_norm.weight") && !name.contains("ffn_gate_inp")
}

/// The format itself, or the nearest of smaller blocks.
fn fitting(format: &'static Quantisation, columns: usize) -> &'static Quantisation {
    if columns.is_multiple_of(format.values) {
        return format;
    }
    let smaller = match format.name {
        "Q4_K" => "Q5_0",
        "Q5_K" => "Q5_1",
        "Q6_K" => "Q8_0",
        same => same,
    };
    let smaller = Quantisation::called(smaller);
    if columns.is_multiple_of(smaller.values) { smaller } else { Quantisation::called("F16") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors(layers: usize, columns: i64, tied: bool) -> Vec<(String, Vec<i64>)> {
        let mut all = vec![
            ("token_embd.weight".to_string(), vec![512, columns]),
            ("output_norm.weight".to_string(), vec![columns]),
        ];
        if !tied {
            all.push(("output.weight".to_string(), vec![512, columns]));
        }
        // Out of order, as files may have them.
        for layer in (0..layers).rev() {
            for part in ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"] {
                all.push((format!("blk.{layer}.{part}.weight"), vec![256, columns]));
            }
            all.push((format!("blk.{layer}.attn_q.bias"), vec![256]));
            all.push((format!("blk.{layer}.ffn_gate_inp.weight"), vec![8, columns]));
        }
        all
    }

    fn of(formats: &[&'static Quantisation], tensors: &[(String, Vec<i64>)], end: &str) -> Vec<&'static str> {
        let mut found: Vec<_> = tensors
            .iter()
            .zip(formats)
            .filter(|((name, _), _)| name == end || name.ends_with(&format!(".{end}")))
            .map(|((n, _), f)| (layer(n), f.name))
            .collect();
        found.sort();
        found.into_iter().map(|(_, name)| name).collect()
    }

    const LLAMA: Model = Model { architecture: "llama", layers: 16, experts: 0, heads: (32, 8) };

    /// Of sixteen blocks, what `llama-quantize` gives more bits: 0, 1, 4, 7, 10, 13, 14, 15.
    #[test]
    fn mixtures_are_llama_cpps() {
        let tensors = tensors(16, 256, true);
        let more = [0, 1, 4, 7, 10, 13, 14, 15];
        for (file_type, usual) in [(FileType::Q4KM, "Q4_K"), (FileType::Q5KM, "Q5_K")] {
            let (formats, fallen_back) = formats(file_type, &tensors, &LLAMA);
            let expected: Vec<_> = (0..16).map(|i| if more.contains(&i) { "Q6_K" } else { usual }).collect();
            assert_eq!(of(&formats, &tensors, "attn_v.weight"), expected);
            assert_eq!(of(&formats, &tensors, "ffn_down.weight"), expected);
            assert_eq!(of(&formats, &tensors, "attn_q.weight"), vec![usual; 16]);
            assert_eq!(of(&formats, &tensors, "token_embd.weight"), ["Q6_K"]);
            for plain in ["attn_q.bias", "output_norm.weight", "ffn_gate_inp.weight"] {
                assert!(of(&formats, &tensors, plain).iter().all(|name| *name == "F32"), "{plain}");
            }
            assert_eq!(fallen_back, 0);
        }
        let tensors = super::tests::tensors(16, 256, false);
        let (formats, _) = formats(FileType::Q4KM, &tensors, &LLAMA);
        assert_eq!(of(&formats, &tensors, "token_embd.weight"), ["Q4_K"]);
        assert_eq!(of(&formats, &tensors, "output.weight"), ["Q6_K"]);
    }

    #[test]
    fn eight_experts_seventy_billions_and_falcon_are_otherwise() {
        let tensors = tensors(80, 256, false);
        let seventy = Model { layers: 80, ..LLAMA };
        let (formats70, _) = formats(FileType::Q4KM, &tensors, &seventy);
        assert!(of(&formats70, &tensors, "attn_v.weight").iter().all(|name| ["Q5_K", "Q6_K"].contains(name)));
        let eight = Model { experts: 8, layers: 80, heads: (32, 32), ..LLAMA };
        let (formats8, _) = formats(FileType::Q4KM, &tensors, &eight);
        assert_eq!(of(&formats8, &tensors, "attn_v.weight"), vec!["Q8_0"; 80]);
        assert_eq!(of(&formats8, &tensors, "attn_k.weight"), vec!["Q8_0"; 80]);
        assert_eq!(of(&formats8, &tensors, "attn_output.weight"), vec!["Q5_K"; 80]);
        let falcon = Model { architecture: "falcon", ..seventy };
        let (formats, _) = formats(FileType::Q4KM, &tensors, &falcon);
        assert_eq!(of(&formats, &tensors, "output.weight"), ["Q8_0"]);
        let downs = of(&formats, &tensors, "ffn_down.weight");
        assert_eq!((downs[0], downs[5], downs[10]), ("Q6_K", "Q5_K", "Q4_K"));
    }

    #[test]
    fn rows_that_are_no_whole_blocks_fall_back() {
        for (file_type, columns, expected) in [
            (FileType::Q4KM, 32 * 3, "Q5_0"),
            (FileType::Q5KM, 32 * 3, "Q5_1"),
            (FileType::Q6K, 32 * 3, "Q8_0"),
            (FileType::Q4_0, 32 * 3, "Q4_0"),
            (FileType::Q8_0, 30, "F16"),
            (FileType::Q4KM, 30, "F16"),
            (FileType::F16, 30, "F16"),
            (FileType::Bf16, 30, "BF16"),
            (FileType::F32, 30, "F32"),
        ] {
            let tensors = tensors(4, columns, true);
            let (formats, fallen_back) = formats(file_type, &tensors, &LLAMA);
            assert_eq!(of(&formats, &tensors, "attn_q.weight"), vec![expected; 4], "{file_type:?}");
            // The embedding of a tied Q4_0 would be Q6_K.
            let any = expected != file_type.format().name || file_type == FileType::Q4_0;
            assert_eq!(fallen_back > 0, any, "{file_type:?}");
        }
        let tensors = tensors(4, 96, true);
        let (formats, _) = formats(FileType::Q4_0, &tensors, &LLAMA);
        assert_eq!(of(&formats, &tensors, "token_embd.weight"), ["Q8_0"]);
    }
}
