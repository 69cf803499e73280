//! GGUF files written here, byte by byte, good and bad; and a real one, by hand.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use tch::{Device, Kind, Tensor};
use tokenizers::Tokenizer;

use crate::recipe::BaseSource;
use crate::weights::Checkpoint;
use crate::{Error, Result};

/// A GGUF file as it is being made.
#[derive(Clone)]
struct Gguf {
    version: u32,
    /// Key, type, bytes of the value.
    metadata: Vec<(String, u32, Vec<u8>)>,
    /// Name, dimensions (fastest first), format, bytes.
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
    alignment: u64,
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes(), value.as_bytes()].concat()
}

fn array(kind: u32, count: u64, bytes: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes(), &count.to_le_bytes()[..], bytes].concat()
}

fn texts(values: &[&str]) -> Vec<u8> {
    array(8, values.len() as u64, &values.iter().flat_map(|value| text(value)).collect::<Vec<_>>())
}

fn floats(tensor: &Tensor) -> Vec<u8> {
    crate::weights::storage::bytes(&tensor.to_kind(Kind::Float).contiguous()).to_vec()
}

impl Gguf {
    fn set(&mut self, key: &str, kind: u32, value: Vec<u8>) -> &mut Self {
        self.metadata.retain(|(other, ..)| other != key);
        self.metadata.push((key.to_string(), kind, value));
        self
    }

    fn number(&mut self, key: &str, value: u32) -> &mut Self {
        self.set(key, 4, value.to_le_bytes().to_vec())
    }

    fn float(&mut self, key: &str, value: f32) -> &mut Self {
        self.set(key, 6, value.to_le_bytes().to_vec())
    }

    fn text(&mut self, key: &str, value: &str) -> &mut Self {
        self.set(key, 8, text(value))
    }

    fn without(&mut self, key: &str) -> &mut Self {
        self.metadata.retain(|(other, ..)| other != key);
        self
    }

    fn tensor(&mut self, name: &str, tensor: &Tensor) -> &mut Self {
        let dimensions = tensor.size().iter().rev().map(|&size| size as u64).collect();
        self.tensors.push((name.to_string(), dimensions, 0, floats(tensor)));
        self
    }

    /// The table's bytes, then the data; offsets as llama.cpp lays them out.
    fn bytes(&self) -> Vec<u8> {
        let mut out = [b"GGUF".as_slice(), &self.version.to_le_bytes()].concat();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, kind, value) in &self.metadata {
            out.extend([text(key), kind.to_le_bytes().to_vec(), value.clone()].concat());
        }
        let mut data = Vec::new();
        for (name, dimensions, kind, bytes) in &self.tensors {
            out.extend(text(name));
            out.extend((dimensions.len() as u32).to_le_bytes());
            out.extend(dimensions.iter().flat_map(|size| size.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend((data.len() as u64).to_le_bytes());
            data.extend(bytes);
            data.resize(data.len().next_multiple_of(self.alignment as usize), 0);
        }
        out.resize(out.len().next_multiple_of(self.alignment as usize), 0);
        out.extend(data);
        out
    }

    fn open(&self) -> Result<Checkpoint> {
        open(&self.bytes())
    }

    fn fault(&self) -> String {
        fault(&self.bytes())
    }
}

fn open(bytes: &[u8]) -> Result<Checkpoint> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, bytes).unwrap();
    // The checkpoint holds the file open, so the folder may go.
    Checkpoint::open(&BaseSource::Gguf(path))
}

fn fault(bytes: &[u8]) -> String {
    let error = open(bytes).unwrap_err();
    assert!(matches!(error, Error::Model(_)), "{error}");
    error.to_string()
}

fn numbers(shape: &[i64]) -> Tensor {
    Tensor::arange(shape.iter().product::<i64>(), (Kind::Float, Device::Cpu)).reshape(shape) / 64 - 1
}

const TOKENS: [&str; 12] = ["<|end|>", "<|im|>", "a", "b", "Ġ", "ab", "Ġab", "1", "2", "12", "<extra>", "[PAD11]"];

/// Llama's order of rows to llama.cpp's: `permute` of its `convert_hf_to_gguf.py`, with tensor operations.
fn permuted(tensor: &Tensor, heads: i64) -> Tensor {
    let size = tensor.size();
    let mut split = vec![heads, 2, size[0] / heads / 2];
    split.extend(&size[1..]);
    tensor.reshape(split.as_slice()).swapaxes(1, 2).reshape(&size)
}

/// Two layers, hidden 8, 4 query heads and 2 key heads of size 2... of size 4.
fn llama() -> Gguf {
    let mut gguf = Gguf { version: 3, metadata: Vec::new(), tensors: Vec::new(), alignment: 32 };
    gguf.text("general.architecture", "llama").number("llama.context_length", 64);
    gguf.number("llama.embedding_length", 8).number("llama.block_count", 2).number("llama.feed_forward_length", 12);
    gguf.number("llama.attention.head_count", 4).number("llama.attention.head_count_kv", 2);
    gguf.number("llama.attention.key_length", 4).number("llama.rope.dimension_count", 4);
    gguf.float("llama.attention.layer_norm_rms_epsilon", 1e-5).float("llama.rope.freq_base", 100_000.0);
    gguf.text("tokenizer.ggml.model", "gpt2").text("tokenizer.ggml.pre", "smollm");
    gguf.set("tokenizer.ggml.tokens", 9, texts(&TOKENS));
    let kinds = [3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 4, 5i32];
    gguf.set("tokenizer.ggml.token_type", 9, array(5, 12, &kinds.map(i32::to_le_bytes).concat()));
    gguf.set("tokenizer.ggml.merges", 9, texts(&["a b", "Ġ ab", "1 2"]));
    gguf.number("tokenizer.ggml.bos_token_id", 1).number("tokenizer.ggml.eos_token_id", 0);
    gguf.text("tokenizer.chat_template", "{{ messages }}");
    gguf.tensor("token_embd.weight", &numbers(&[12, 8])).tensor("output_norm.weight", &numbers(&[8]));
    for layer in 0..2 {
        for (name, shape) in [("attn_norm", vec![8]), ("attn_v", vec![8, 8]), ("ffn_down", vec![8, 12])] {
            gguf.tensor(&format!("blk.{layer}.{name}.weight"), &numbers(&shape));
        }
        gguf.tensor(&format!("blk.{layer}.attn_q.weight"), &permuted(&numbers(&[16, 8]), 4));
        gguf.tensor(&format!("blk.{layer}.attn_k.weight"), &permuted(&numbers(&[8, 8]), 2));
        gguf.tensor(&format!("blk.{layer}.attn_q.bias"), &permuted(&numbers(&[16]), 4));
    }
    gguf
}

#[test]
fn names_rows_and_config_are_those_of_transformers() {
    let checkpoint = llama().open().unwrap();
    let read = |name: &str| checkpoint.tensor(name, Kind::Float, Device::Cpu).unwrap();
    assert_eq!(read("model.layers.1.self_attn.q_proj.weight"), numbers(&[16, 8]));
    assert_eq!(read("model.layers.1.self_attn.k_proj.weight"), numbers(&[8, 8]));
    assert_eq!(read("model.layers.0.self_attn.q_proj.bias"), numbers(&[16]));
    assert_eq!(read("model.layers.0.self_attn.v_proj.weight"), numbers(&[8, 8]));
    assert_eq!(read("model.embed_tokens.weight"), numbers(&[12, 8]));
    assert_eq!(checkpoint.shape("model.layers.0.mlp.down_proj.weight"), Some(vec![8, 12]));
    let expected = serde_json::json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 64,
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "intermediate_size": 12,
        "num_attention_heads": 4,
        "rms_norm_eps": 1e-5,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "rope_theta": 100000.0,
        "rope_scaling": null,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "attention_bias": true,
        "mlp_bias": false,
        "tie_word_embeddings": true,
        "vocab_size": 12,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    });
    assert_eq!(checkpoint.config, expected);
    assert_eq!(checkpoint.stored_as("model.layers.0.self_attn.q_proj.weight"), Some("F32"));
    let kept: Vec<_> = checkpoint.sidecars.keys().map(String::as_str).collect();
    let all = ["chat_template.jinja", "config.json", "generation_config.json", "special_tokens_map.json"];
    assert_eq!(kept[..4], all);
}

#[test]
fn quantised_rows_are_put_into_order_and_rounded_once() {
    // Rows of 4096 and a bit, so that a row takes two pieces; Q8_0 with the scale 1/8.
    let (rows, row) = (8, 4096 + 64);
    let mut blocks = Vec::new();
    let stored: Vec<i8> = (0..rows * row).map(|i| (i * 31 % 255 - 127) as i8).collect();
    for block in stored.chunks(32) {
        blocks.extend(half::f16::from_f32(0.125).to_le_bytes());
        blocks.extend(block.iter().map(|&q| q as u8));
    }
    let mut gguf = llama();
    gguf.number("llama.attention.head_count", 2).tensors.retain(|(name, ..)| !name.contains("attn_"));
    gguf.tensors.push(("blk.0.attn_q.weight".to_string(), vec![row as u64, rows as u64], 8, blocks));
    let checkpoint = gguf.open().unwrap();
    let expected = Tensor::from_slice(&stored).to_kind(Kind::Float).reshape([rows as i64, row as i64]) * 0.125;
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half, Kind::Double] {
        let read = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight", kind, Device::Cpu).unwrap();
        assert_eq!(permuted(&read.to_kind(Kind::Float), 2), expected, "{kind:?}");
    }
}

#[test]
fn infinite_scales_and_values_too_large_for_fp16_are_refused() {
    let mut gguf = llama();
    let block = [half::f16::INFINITY.to_le_bytes().as_slice(), &[1; 32]].concat();
    gguf.tensors.push(("blk.0.ffn_up.weight".to_string(), vec![32, 1], 8, block));
    let large = Tensor::from_slice(&[1f32, 65520.0]);
    gguf.tensor("blk.0.ffn_gate.weight", &large);
    let checkpoint = gguf.open().unwrap();
    let read = |name: &str, kind| checkpoint.tensor(name, kind, Device::Cpu);
    let error = read("model.layers.0.mlp.up_proj.weight", Kind::BFloat16).unwrap_err().to_string();
    assert!(error.contains("blk.0.ffn_up.weight: 32 values are NaN or infinite as BF16"), "{error}");
    assert!(read("model.layers.0.mlp.gate_proj.weight", Kind::BFloat16).is_ok());
    let error = read("model.layers.0.mlp.gate_proj.weight", Kind::Half).unwrap_err().to_string();
    assert!(error.contains("1 value is NaN or infinite as F16"), "{error}");
}

#[test]
fn rope_scaling_is_read_from_keys() {
    let scaling = |gguf: &Gguf| gguf.open().map(|checkpoint| checkpoint.config["rope_scaling"].clone());
    let fault = |gguf: &Gguf| scaling(gguf).unwrap_err().to_string();
    let key = "llama.rope.scaling.type";
    let linear = scaling(llama().text(key, "linear").float("llama.rope.scaling.factor", 4.0));
    assert_eq!(linear.unwrap(), serde_json::json!({"rope_type": "linear", "factor": 4.0}));
    let mut yarn = llama();
    yarn.text(key, "yarn").float("llama.rope.scaling.factor", 16.0);
    yarn.number("llama.rope.scaling.original_context_length", 4096);
    let expected = serde_json::json!({"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096});
    assert_eq!(scaling(&yarn).unwrap(), expected);
    assert_eq!(scaling(llama().text(key, "none")).unwrap(), serde_json::Value::Null);
    assert!(fault(llama().text(key, "longrope")).contains("longrope is not supported"));
    assert!(fault(llama().text(key, "linear")).contains("scaling.factor: is missing"));
    let factors = |factors: [f32; 2]| llama().tensor("rope_freqs.weight", &Tensor::from_slice(&factors)).clone();
    assert!(fault(&factors([3.0, 1.0])).contains("not those of Llama 3"));
    assert_eq!(scaling(&factors([1.0, 1.0])).unwrap(), serde_json::Value::Null);
}

#[test]
fn counts_and_lengths_beyond_the_file_are_refused_before_they_are_believed() {
    let good = llama().bytes();
    let with = |at: usize, value: u64| {
        let mut bytes = good.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        fault(&bytes)
    };
    for huge in [1 << 63, u64::MAX, u64::MAX / 13 + 1, 1 << 40] {
        assert!(with(8, huge).contains("tensors do not fit into"), "{huge}");
        assert!(with(16, huge).contains("metadata keys do not fit into"), "{huge}");
        assert!(with(24, huge).contains("bytes of text do not fit"), "{huge}");
    }
    let mut gguf = llama();
    for (kind, bytes, expected) in [
        (8, (1u64 << 63).to_le_bytes().to_vec(), "x: 9223372036854775808 bytes of text do not fit"),
        (9, array(4, 1 << 63, &[]), "9223372036854775808 elements do not fit"),
        (9, array(4, 1 << 62, &[]), "elements do not fit"),
        (9, array(8, 1 << 61, &[]), "elements do not fit"),
        (9, array(9, 1, &array(4, 1, &[0; 4])), "array of arrays"),
        (9, array(13, 1, &[0; 8]), "unknown type 13"),
        (13, vec![], "unknown type 13"),
        (7, vec![2], "must be 0 or 1, is 2"),
        (8, [2u64.to_le_bytes().as_slice(), b"\xff\xfe"].concat(), "not UTF-8"),
    ] {
        assert!(gguf.set("x", kind, bytes).fault().contains(expected), "{expected}");
    }
    for end in (0..good.len() - 1).step_by(7) {
        let text = fault(&good[..end]);
        assert!(text.contains("fit into the") || text.contains("truncated"), "{end}: {text}");
    }
    let mut gguf = llama();
    gguf.metadata.push(("llama.block_count".to_string(), 4, vec![1, 0, 0, 0]));
    assert!(gguf.fault().contains("llama.block_count: the key appears twice"));
}

#[test]
fn other_files_and_versions_are_named() {
    assert!(fault(b"").contains("fit into the 0 bytes left"));
    assert!(fault(b"PK\x03\x04aaaaaaaa").contains("pickle archive"));
    assert!(fault(b"version https://git-lfs.github.com/spec/v1").contains("git lfs pull"));
    for (version, expected) in [(1, "GGUF version 1"), (4, "GGUF version 4"), (3u32.swap_bytes(), "big-endian")] {
        assert!(Gguf { version, ..llama() }.fault().contains(expected));
    }
    Gguf { version: 2, ..llama() }.open().unwrap();
}

#[test]
fn alignments_that_are_no_powers_of_two_are_refused() {
    for alignment in [0, 3, 48, u32::MAX] {
        assert!(
            llama().number("general.alignment", alignment).fault().contains("must be a power of two"),
            "{alignment}"
        );
    }
    assert!(llama().text("general.alignment", "32").fault().contains("must be a power of two"));
    let mut wide = Gguf { alignment: 128, ..llama() };
    assert_eq!(wide.number("general.alignment", 128).open().unwrap().names().len(), 14);
    let mut absent = Gguf { alignment: 4, ..llama() };
    assert!(absent.fault().contains("truncated") || absent.fault().contains("not a multiple of the alignment"));
    assert!(absent.set("general.alignment", 10, (1u64 << 62).to_le_bytes().to_vec()).fault().contains("end past"));
}

#[test]
fn damaged_tensors_are_named() {
    let with = |dimensions: &[u64], kind: u32, bytes: usize| {
        let mut gguf = llama();
        gguf.tensors.push(("blk.1.ffn_up.weight".to_string(), dimensions.to_vec(), kind, vec![0; bytes]));
        let text = gguf.fault();
        assert!(text.contains("blk.1.ffn_up.weight"), "{text}");
        text
    };
    assert!(with(&[1, 1, 1, 1, 1], 0, 4).contains("has 5 dimensions; at most 4"));
    assert!(with(&[1 << 32, 1 << 32], 0, 4).contains("overflow"));
    assert!(with(&[1 << 21, 1 << 21, 1 << 21, 2], 0, 4).contains("overflow"));
    assert!(with(&[0, 1 << 63], 0, 0).contains("overflow"));
    assert!(with(&[1 << 40], 0, 4).contains("end past the file"));
    assert!(with(&[33], 8, 34).contains("33 numbers are not whole blocks of 32 (Q8_0)"));
    assert!(with(&[256], 16, 66).contains("stored as IQ2_XXS, which is not supported"));
    assert!(with(&[32], 99, 66).contains("unknown number format 99"));
    // The last tensor one byte short.
    let mut bytes = llama().bytes();
    bytes.truncate(bytes.len() - 1);
    assert!(fault(&bytes).contains("blk.1.attn_q.bias: its 64 bytes"));

    let mut twice = llama();
    twice.tensor("output_norm.weight", &numbers(&[8]));
    assert!(twice.fault().contains("output_norm.weight: the tensor appears twice"));

    // The second tensor's offset (the 8 bytes before the third's name length) made that of the first.
    let good = llama().bytes();
    let name = good.windows(18).position(|window| window == b"output_norm.weight").unwrap();
    let offset = name + 18 + 4 + 8 + 4;
    let with = |value: u64| {
        let mut bytes = good.clone();
        bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
        fault(&bytes)
    };
    assert!(with(0).contains("its bytes begin at 0, inside those of"));
    assert!(with(1).contains("not a multiple of the alignment 32"));
    assert!(with(1 << 40).contains("end past the file"));
    assert!(with(u64::MAX - 31).contains("end past the file"));
}

#[test]
fn missing_and_wrong_metadata_is_named() {
    for key in ["general.architecture", "llama.block_count", "tokenizer.ggml.tokens", "tokenizer.ggml.merges"] {
        let text = llama().without(key).fault();
        assert!(text.contains(key) && text.contains("missing"), "{text}");
    }
    assert!(llama().text("general.architecture", "rwkv7").fault().contains("rwkv7 is not supported from GGUF"));
    assert!(llama().number("llama.attention.head_count", 0).fault().contains("must be positive, is 0"));
    assert!(llama().number("llama.attention.head_count", 3).fault().contains("not whole heads (3 query, 2 key)"));
    assert!(llama().number("llama.expert_count", 8).fault().contains("8 experts are not supported"));
    assert!(llama().number("llama.rope.dimension_count", 2).fault().contains("is 2, but a head is 4"));
    assert!(llama().float("llama.rope.freq_base", f32::NAN).fault().contains("a finite number"));
    assert!(llama().text("llama.block_count", "2").fault().contains("should be one integer"));
    assert!(llama().number("tokenizer.ggml.eos_token_id", 12).fault().contains("is 12, but there are 12 tokens"));
    assert!(llama().text("tokenizer.ggml.model", "bert").fault().contains("bert is not supported"));
    assert!(llama().text("tokenizer.ggml.pre", "odd").fault().contains("the splitting odd is not supported"));
    let merge = |merge: &str| llama().set("tokenizer.ggml.merges", 9, texts(&["a b", merge])).fault();
    assert!(merge("a x").contains("merge 1 (\"a x\") needs the token \"x\""));
    assert!(merge("b a").contains("needs the token \"ba\""));
    assert!(merge("ab").contains("not two pieces"));
    assert!(llama().set("tokenizer.ggml.tokens", 9, texts(&["a"; 13])).fault().contains("13 tokens"));
    let mut gguf = llama();
    gguf.tensors.retain(|(name, ..)| name != "token_embd.weight");
    assert!(gguf.fault().contains("token_embd.weight"));
    assert!(
        llama()
            .tensor("blk.0.ffn_gate_exps.weight", &numbers(&[8]))
            .fault()
            .contains("no tensor of this name is known")
    );
}

#[test]
fn split_files_are_read_together_and_a_missing_part_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = |part: u32| folder.path().join(format!("m-{part:05}-of-00002.gguf"));
    let mut first = llama();
    let last = first.tensors.split_off(6);
    first.number("split.count", 2).number("split.tensors.count", 14);
    let second = Gguf { metadata: Vec::new(), tensors: last, ..first.clone() };
    fs::write(path(1), first.bytes()).unwrap();
    let open = |path: &Path| Checkpoint::open(&BaseSource::Gguf(path.to_path_buf()));
    let error = open(&path(1)).unwrap_err().to_string();
    assert!(error.contains("m-00002-of-00002.gguf: this part of the 2"), "{error}");
    fs::write(path(2), second.bytes()).unwrap();
    for part in [1, 2] {
        let checkpoint = open(&path(part)).unwrap();
        assert_eq!((checkpoint.names().len(), checkpoint.files.len()), (14, 2));
        let read = checkpoint.tensor("model.layers.1.self_attn.q_proj.weight", Kind::Float, Device::Cpu).unwrap();
        assert_eq!(read, numbers(&[16, 8]));
    }
    let alone = folder.path().join("m.gguf");
    fs::copy(path(1), &alone).unwrap();
    assert!(open(&alone).unwrap_err().to_string().contains("this is one of 2 parts"));
}

fn encode(checkpoint: &Checkpoint, text: &str, special: bool) -> Vec<u32> {
    let tokenizer = Tokenizer::from_bytes(&checkpoint.sidecars["tokenizer.json"]).unwrap();
    tokenizer.encode(text, special).unwrap().get_ids().to_vec()
}

#[test]
fn byte_level_tokenizers_split_as_their_kind_says() {
    let smollm = llama().open().unwrap();
    // Digits one by one, special and user-defined tokens whole.
    assert_eq!(encode(&smollm, "ab ab12<|im|><extra>", true), [5, 6, 7, 8, 1, 10]);
    let qwen = llama().text("tokenizer.ggml.pre", "gpt-2").open().unwrap();
    assert_eq!(encode(&qwen, "ab ab12", true), [5, 6, 9]);
    // Llama 3 takes digits by three and adds BOS by itself.
    let llama3 = llama().text("tokenizer.ggml.pre", "llama-bpe").open().unwrap();
    assert_eq!(encode(&llama3, "ab12", true), [1, 5, 9]);
    let silent = llama().text("tokenizer.ggml.pre", "llama-bpe").set("tokenizer.ggml.add_bos_token", 7, vec![0]).open();
    assert_eq!(encode(&silent.unwrap(), "ab", true), [5]);
    let both = llama()
        .set("tokenizer.ggml.add_bos_token", 7, vec![1])
        .set("tokenizer.ggml.add_eos_token", 7, vec![1])
        .open()
        .unwrap();
    assert_eq!(encode(&both, "ab", true), [1, 5, 0]);
    let plain = llama().without("tokenizer.ggml.pre").open().unwrap();
    assert!(plain.notices()[0].contains("GPT-2's way is assumed"));

    let tokenizer = Tokenizer::from_bytes(&smollm.sidecars["tokenizer.json"]).unwrap();
    assert_eq!(tokenizer.decode(&[5, 6, 1, 10], true).unwrap(), "ab ab<extra>");
    assert_eq!(tokenizer.token_to_id("[PAD11]"), None);
    let config: serde_json::Value = serde_json::from_slice(&smollm.sidecars["tokenizer_config.json"]).unwrap();
    assert_eq!((&config["bos_token"], &config["eos_token"]), (&"<|im|>".into(), &"<|end|>".into()));
    assert_eq!(config["chat_template"], "{{ messages }}");
    let generation = |gguf: &Gguf| -> serde_json::Value {
        serde_json::from_slice(&gguf.open().unwrap().sidecars["generation_config.json"]).unwrap()
    };
    assert_eq!(generation(&llama()), serde_json::json!({"bos_token_id": 1, "eos_token_id": 0}));
    assert_eq!(generation(llama().number("tokenizer.ggml.eot_token_id", 1))["eos_token_id"], serde_json::json!([0, 1]));
}

#[test]
fn sentence_piece_tokenizers_merge_by_score() {
    let tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "<0xC3>", "<0xA9>", "▁", "a", "b", "ab", "▁a", "▁ab", "bb"];
    let scores = [0., 0., 0., 0., 0., 0., -6., -7., -8., -1., -2., -3., -4f32];
    let kinds = [2, 3, 3, 6, 6, 6, 1, 1, 1, 1, 1, 1, 1i32];
    let mut gguf = llama();
    gguf.text("tokenizer.ggml.model", "llama").without("tokenizer.ggml.merges").without("tokenizer.ggml.pre");
    gguf.set("tokenizer.ggml.tokens", 9, texts(&tokens));
    gguf.set("tokenizer.ggml.scores", 9, array(6, 13, &scores.map(f32::to_le_bytes).concat()));
    gguf.set("tokenizer.ggml.token_type", 9, array(5, 13, &kinds.map(i32::to_le_bytes).concat()));
    gguf.number("tokenizer.ggml.eos_token_id", 2).number("tokenizer.ggml.unknown_token_id", 0);
    gguf.tensors[0] = ("token_embd.weight".to_string(), vec![8, 13], 0, floats(&numbers(&[13, 8])));
    let checkpoint = gguf.open().unwrap();
    // BOS, then ▁abb: "ab" (-1) wins over "▁a" (-2), then ▁ab.
    assert_eq!(encode(&checkpoint, "abb", true), [1, 11, 8]);
    assert_eq!(encode(&checkpoint, "a\né", false), [10, 3, 4, 5]);
    let tokenizer = Tokenizer::from_bytes(&checkpoint.sidecars["tokenizer.json"]).unwrap();
    assert_eq!(tokenizer.decode(&[1, 10, 6, 4, 5], true).unwrap(), "a é");
    gguf.set("tokenizer.ggml.add_space_prefix", 7, vec![0]).set("tokenizer.ggml.add_bos_token", 7, vec![0]);
    assert_eq!(encode(&gguf.open().unwrap(), "ab ab", true), [9, 11]);
    let long = "a".repeat(2000);
    let mut swollen = tokens;
    swollen[12] = &long;
    gguf.set("tokenizer.ggml.tokens", 9, texts(&swollen));
    assert!(gguf.fault().contains("token 12 is 2000 bytes long, at most 1024"));
    gguf.set("tokenizer.ggml.tokens", 9, texts(&tokens));
    assert!(gguf.without("tokenizer.ggml.scores").fault().contains("tokenizer.ggml.scores: is missing"));
}

/// Mutated files never panic and never ask for more memory than a small multiple of the file.
#[test]
fn mutated_files_never_panic() {
    let good = llama().bytes();
    let mut random = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = |below: usize| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        (random % below as u64) as usize
    };
    let mut accepted = 0;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let file = fs::File::create(&path).unwrap();
    for _ in 0..5_000 {
        let mut bytes = good.clone();
        for _ in 0..=next(3) {
            let at = next(bytes.len() - 8);
            match next(4) {
                0 => bytes[at] = next(256) as u8,
                1 => bytes[at] ^= 1 << next(8),
                2 => bytes[at..at + 8].copy_from_slice(&[0, 1 << 40, 1 << 63, u64::MAX][next(4)].to_le_bytes()),
                _ => bytes.truncate(at.max(16)),
            }
        }
        file.write_all_at(&bytes, 0).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        if let Ok(checkpoint) = Checkpoint::open(&BaseSource::Gguf(path.clone())) {
            accepted += 1;
            for name in checkpoint.names() {
                let _ = checkpoint.tensor(name, Kind::BFloat16, Device::Cpu);
            }
        }
    }
    assert!(accepted > 50, "{accepted}");
}

/// By hand, with `ENGRAFT_GGUF` a real file and `ENGRAFT_GGUF_REFERENCE` the folder that `tests/python/gguf_reference.py` made of
/// it: `cargo test --release --lib real_gguf -- --ignored --nocapture`.
#[test]
#[ignore = "needs a real GGUF file and transformers' reading of it"]
fn real_gguf_equals_transformers() {
    let path = std::env::var("ENGRAFT_GGUF").unwrap();
    let start = std::time::Instant::now();
    let checkpoint = Checkpoint::open(&BaseSource::Gguf(path.into())).unwrap();
    let opened = start.elapsed();
    let read = |name: &str, kind| checkpoint.tensor(name, kind, Device::Cpu).unwrap();
    let tensors: Vec<_> = checkpoint.names().iter().map(|name| read(name, Kind::BFloat16)).collect();
    println!("opened in {opened:?}, {} tensors as bf16 in {:?}", tensors.len(), start.elapsed() - opened);

    let folder = std::path::PathBuf::from(std::env::var("ENGRAFT_GGUF_REFERENCE").unwrap());
    // For a look from the other side: transformers should load these files.
    fs::create_dir_all(folder.join("engraft")).unwrap();
    for (name, bytes) in &checkpoint.sidecars {
        fs::write(folder.join("engraft").join(name), bytes).unwrap();
    }
    let reference = Tensor::read_safetensors(folder.join("model.safetensors")).unwrap();
    let mut compared = 0;
    for (name, expected) in reference {
        if checkpoint.shape(&name).is_none() {
            assert_eq!(name, "lm_head.weight");
            continue;
        }
        assert_eq!(read(&name, Kind::Float), expected, "{name}");
        compared += 1;
    }
    assert_eq!(compared, checkpoint.names().len());
    let cases: Vec<(String, Vec<u32>)> =
        serde_json::from_slice(&fs::read(folder.join("tokens.json")).unwrap()).unwrap();
    let tokenizer = Tokenizer::from_bytes(&checkpoint.sidecars["tokenizer.json"]).unwrap();
    for (text, expected) in &cases {
        let encoding = tokenizer.encode(text.as_str(), false).unwrap();
        if encoding.get_ids() != expected {
            println!("{text:?}: {:?} here, {expected:?} in transformers", encoding.get_tokens());
        }
        assert_eq!(tokenizer.decode(encoding.get_ids(), false).unwrap(), *text);
    }
    println!("{compared} tensors and {} texts compared", cases.len());
}
