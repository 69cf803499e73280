//! Whole files, byte for byte, against files spelled out here by the format's own description
//! (<https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>): which keys there are, of which types and in which order, and no others;
//! where every tensor begins, and its rows.

use super::tests::{base, fixtures};
use super::*;
use crate::adapter::LoadedAdapter;
use crate::export::sidecars;
use crate::recipe::BaseSource;

/// A file in the making.
#[derive(Default)]
struct File {
    keys: (u64, Vec<u8>),
    tensors: (u64, Vec<u8>),
    data: Vec<u8>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

impl File {
    fn key(&mut self, name: &str, kind: u32, value: &[u8]) {
        self.keys.0 += 1;
        self.keys.1.extend([&text(name), &kind.to_le_bytes()[..], value].concat());
    }

    fn u32(&mut self, name: &str, value: u32) {
        self.key(name, 4, &value.to_le_bytes());
    }

    fn f32(&mut self, name: &str, value: f32) {
        self.key(name, 6, &value.to_le_bytes());
    }

    fn bool(&mut self, name: &str, value: bool) {
        self.key(name, 7, &[u8::from(value)]);
    }

    fn text(&mut self, name: &str, value: &str) {
        self.key(name, 8, &text(value));
    }

    /// `count` values of a type, one after the other.
    fn array(&mut self, name: &str, kind: u32, count: u64, values: &[u8]) {
        self.key(name, 9, &[&kind.to_le_bytes()[..], &count.to_le_bytes(), values].concat());
    }

    /// A tensor in fp32, by its rows.
    fn tensor(&mut self, name: &str, rows: &[Vec<f32>]) {
        self.tensors.0 += 1;
        let dimensions = if rows.len() == 1 { vec![rows[0].len()] } else { vec![rows[0].len(), rows.len()] };
        let head = &mut self.tensors.1;
        head.extend([&text(name), &(dimensions.len() as u32).to_le_bytes()[..]].concat());
        head.extend(dimensions.iter().flat_map(|size| (*size as u64).to_le_bytes()));
        head.extend([&0u32.to_le_bytes()[..], &(self.data.len() as u64).to_le_bytes()].concat());
        self.data.extend(rows.iter().flatten().flat_map(|number| number.to_le_bytes()));
        self.data.resize(self.data.len().next_multiple_of(32), 0);
    }

    fn bytes(self) -> Vec<u8> {
        let counts = [&self.tensors.0.to_le_bytes()[..], &self.keys.0.to_le_bytes()].concat();
        let mut all = [b"GGUF", &3u32.to_le_bytes()[..], &counts, &self.keys.1, &self.tensors.1].concat();
        all.resize(all.len().next_multiple_of(32), 0);
        [all, self.data].concat()
    }
}

fn rows(tensor: &tch::Tensor) -> Vec<Vec<f32>> {
    let rows = if tensor.dim() == 1 { tensor.unsqueeze(0) } else { tensor.shallow_clone() };
    (0..rows.size()[0]).map(|row| Vec::try_from(rows.get(row).contiguous()).unwrap()).collect()
}

/// Of each head of four rows, llama.cpp has the first and the third beside each other, which turn together.
fn in_pairs(rows: Vec<Vec<f32>>) -> Vec<Vec<f32>> {
    let head = |head: &[Vec<f32>]| [0, 2, 1, 3].map(|row| head[row].clone());
    rows.chunks(4).flat_map(head).collect()
}

/// The two tell where they part, which an assertion on all bytes would not.
fn same(ours: &[u8], expected: &[u8]) {
    let apart = ours.iter().zip(expected).position(|(one, other)| one != other);
    let apart = apart.or((ours.len() != expected.len()).then_some(ours.len().min(expected.len())));
    if let Some(at) = apart {
        let around = |bytes: &[u8]| {
            String::from_utf8_lossy(&bytes[at.saturating_sub(60)..(at + 60).min(bytes.len())]).into_owned()
        };
        panic!("byte {at} of {} and {}:\n{:?}\n{:?}", ours.len(), expected.len(), around(ours), around(expected));
    }
}

fn of_a_base(file: &mut File, kind: &str, name: &str, size: &str) {
    file.text("general.architecture", "llama");
    file.text("general.type", kind);
    file.text("general.name", name);
    file.text("general.size_label", size);
    file.text("general.license", "other");
    file.text("general.license.name", "tickets");
    file.text("general.license.link", "LICENSE");
    file.text("general.base_model.0.name", "base-tied");
    file.u32("general.base_model.count", 1);
}

/// The small base, with a card beside it that says its licence.
fn licensed(root: &Path) -> Checkpoint {
    let folder = root.join("base-tied");
    std::fs::create_dir(&folder).unwrap();
    for file in std::fs::read_dir(fixtures("peft/base-tied")).unwrap() {
        let path = file.unwrap().path();
        std::fs::copy(&path, folder.join(path.file_name().unwrap())).unwrap();
    }
    let card = "---\nlicense: other\nlicense_name: tickets\nlicense_link: LICENSE\n---\n";
    std::fs::write(folder.join("README.md"), card).unwrap();
    let mut opened = Checkpoint::open(&BaseSource::Folder(folder)).unwrap();
    opened.sidecars = base("tied").sidecars;
    opened
}

#[test]
fn a_models_file() {
    let root = tempfile::tempdir().unwrap();
    let (path, base) = (root.path().join("m.gguf"), licensed(root.path()));
    let texts = Texts { name: Some("tickets"), sidecars: &sidecars(&base, Some("{{ messages }}")) };
    write_model(&path, &base, Learned::default(), None, FileType::F32, texts, &|_, _| ()).unwrap();

    let mut file = File::default();
    of_a_base(&mut file, "model", "tickets", "1.6K");
    for (key, value) in [
        ("block_count", 3),
        ("context_length", 32),
        ("embedding_length", 8),
        ("vocab_size", 16),
        ("feed_forward_length", 12),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("attention.key_length", 4),
        ("attention.value_length", 4),
    ] {
        file.u32(&format!("llama.{key}"), value);
    }
    file.f32("llama.attention.layer_norm_rms_epsilon", 1e-6);
    file.u32("llama.rope.dimension_count", 4);
    file.f32("llama.rope.freq_base", 10_000.0);
    file.u32("general.file_type", 0);
    file.u32("general.quantization_version", 2);
    file.text("tokenizer.ggml.model", "gpt2");
    file.text("tokenizer.ggml.pre", "gpt-2");
    file.array(
        "tokenizer.ggml.tokens",
        8,
        16,
        &(b'a'..=b'p').flat_map(|c| text(&char::from(c).to_string())).collect::<Vec<_>>(),
    );
    file.array("tokenizer.ggml.token_type", 5, 16, &[1i32; 16].map(i32::to_le_bytes).concat());
    file.array("tokenizer.ggml.merges", 8, 0, &[]);
    file.u32("tokenizer.ggml.bos_token_id", 1);
    file.u32("tokenizer.ggml.eos_token_id", 2);
    file.bool("tokenizer.ggml.add_bos_token", false);
    file.bool("tokenizer.ggml.add_eos_token", false);
    file.text("tokenizer.chat_template", "{{ messages }}");
    let named = |gguf: &str, stored: &str, file: &mut File| {
        let found = rows(&base.tensor(&format!("model.{stored}.weight"), Kind::Float, tch::Device::Cpu).unwrap());
        let paired = ["attn_q", "attn_k"].iter().any(|end| gguf.ends_with(end));
        file.tensor(&format!("{gguf}.weight"), &if paired { in_pairs(found) } else { found });
    };
    named("token_embd", "embed_tokens", &mut file);
    for layer in 0..3 {
        for (gguf, stored) in [
            ("attn_norm", "input_layernorm"),
            ("ffn_down", "mlp.down_proj"),
            ("ffn_gate", "mlp.gate_proj"),
            ("ffn_up", "mlp.up_proj"),
            ("ffn_norm", "post_attention_layernorm"),
            ("attn_k", "self_attn.k_proj"),
            ("attn_output", "self_attn.o_proj"),
            ("attn_q", "self_attn.q_proj"),
            ("attn_v", "self_attn.v_proj"),
        ] {
            named(&format!("blk.{layer}.{gguf}"), &format!("layers.{layer}.{stored}"), &mut file);
        }
    }
    named("output_norm", "norm", &mut file);
    same(&std::fs::read(path).unwrap(), &file.bytes());
}

#[test]
fn an_adapters_file() {
    let root = tempfile::tempdir().unwrap();
    let (path, base) = (root.path().join("a.gguf"), licensed(root.path()));
    let loaded = LoadedAdapter::read(&fixtures("peft/names")).unwrap();
    write_adapter(&path, None, &base, &loaded.updates, &|_, _| ()).unwrap();

    let mut file = File::default();
    of_a_base(&mut file, "adapter", "base-tied", "0.29K");
    file.text("adapter.type", "lora");
    file.f32("adapter.lora.alpha", 5.5);
    file.u32("general.file_type", 0);
    file.u32("general.quantization_version", 2);
    for layer in 0..3 {
        for (gguf, module) in [("attn_q", "q_proj"), ("attn_v", "v_proj")] {
            let module = format!("model.layers.{layer}.self_attn.{module}");
            let update = loaded.updates.iter().find(|update| update.module == module).unwrap();
            let (a, b) = (rows(&update.a), rows(&update.b));
            file.tensor(&format!("blk.{layer}.{gguf}.weight.lora_a"), &a);
            let b = if gguf == "attn_q" { in_pairs(b) } else { b };
            file.tensor(&format!("blk.{layer}.{gguf}.weight.lora_b"), &b);
        }
    }
    same(&std::fs::read(path).unwrap(), &file.bytes());
}
