//! The only forward.

use std::cell::RefCell;
use std::collections::BTreeMap;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::attention::HandedOn;
use super::cache::Cache;
use super::embedding::{Embedding, grown};
use super::families;
use super::layer::{Context, Layer};
use super::layer_inputs::LayerInputs;
use super::linear::{Linear, Trained, Weight};
use super::load::Reader;
use super::router::{Balance, Router};
use super::spec::{ModelSpec, Position, Rope};
use super::streams::Copies;
use crate::ops::{self, Documents, Flow, Norm, Offload, rope::Rotation};
use crate::quant::{Digest, Scheme};
use crate::torch_ext::{sent, uniform};
use crate::weights::Checkpoint;
use crate::{Error, Fault, Result};

/// A language model: frozen base weights, with the adapters attached to its linears.
#[derive(Debug)]
pub struct Decoder {
    /// What it is.
    pub spec: ModelSpec,
    /// Number type of weights and activations.
    pub kind: Kind,
    /// Where it lives.
    pub device: Device,
    /// Fingerprints of the linears' weights as they were quantised, by module, also of those that are kept whole again.
    pub digests: BTreeMap<String, Digest>,
    /// The token embedding.
    pub embedding: Embedding,
    embedding_norm: Option<Norm>,
    layer_inputs: Option<LayerInputs>,
    /// Where there are several copies of the stream.
    copies: Option<Copies>,
    layers: Vec<Layer>,
    /// The different rotary embeddings of the blocks, each made once per forward.
    ropes: Vec<Rope>,
    final_norm: Norm,
    head: Linear,
}

/// What the dropout seeds of one pass through a block and the next are apart: odd, and far from what steps and micro-batches add.
const PASS: u64 = 0xd1b5_4a32_d192_ed03;

/// What blocks do to take less memory. It changes nothing that is computed beyond rounding.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Thrift {
    /// How many of the first blocks run again in backward instead of keeping their activations.
    pub recomputed_layers: usize,
    /// How many tokens go through the dense feed-forwards of these at a time, and of all blocks in evaluation; all at once without it.
    pub feed_forward_tile: Option<u64>,
    /// Whether what the recomputed blocks read waits in the host's memory for backward.
    pub offload: bool,
}

impl Thrift {
    /// The first blocks recomputed, and no more than that.
    pub fn recomputing(recomputed_layers: usize) -> Self {
        Self { recomputed_layers, ..Self::default() }
    }
}

/// What changes from one forward to the next.
#[derive(Debug, Clone, Copy, Default)]
pub struct Forward<'a> {
    /// Makes the dropout masks and the noise of this micro-batch; `None` is evaluation.
    pub seed: Option<u64>,
    /// NEFTune's alpha (arXiv:2310.05914): uniform noise of `alpha / sqrt(L D)` on the embeddings of a document of L tokens.
    pub noise_alpha: f64,
    /// What blocks do to take less memory.
    pub thrift: Thrift,
    /// Takes in what the routers choose, and adds its loss's gradient in backward.
    pub balance: Option<&'a Balance>,
}

impl Decoder {
    /// Reads the weights tensor by tensor; `progress` is called with bytes read so far and in all.
    ///
    /// Errors: those of [`families::spec`]; what the checkpoint finds damaged.
    pub fn load(checkpoint: &Checkpoint, kind: Kind, device: Device, progress: &dyn Fn(u64, u64)) -> Result<Self> {
        Self::load_kept(checkpoint, kind, device, None, progress)
    }

    /// [`Decoder::load`], the weights of linears quantised as they are read where `scheme` says so: the peak is the quantised model
    /// and one whole tensor. Where `kind` is not the scheme's, all numbers are those that the scheme has them be, computed with in
    /// `kind`, and the linears' are kept whole.
    pub fn load_kept(
        checkpoint: &Checkpoint,
        kind: Kind,
        device: Device,
        scheme: Option<&Scheme>,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Self> {
        Self::load_as(families::spec(checkpoint)?, checkpoint, kind, device, scheme, progress)
    }

    /// [`Decoder::load_kept`] of a checkpoint whose spec is known: that of [`families::spec`].
    pub fn load_as(
        mut spec: ModelSpec,
        checkpoint: &Checkpoint,
        kind: Kind,
        device: Device,
        scheme: Option<&Scheme>,
        progress: &dyn Fn(u64, u64),
    ) -> Result<Self> {
        spec.grow(checkpoint.vocabulary)?;
        let grown = |table| grown(table, spec.vocab_size);
        let numbers: i64 = spec.tensors().values().map(|shape| shape.iter().product::<i64>()).sum();
        let bytes = |numbers: u64| numbers * kind.elt_size_in_bytes() as u64;
        let done = std::cell::Cell::new(0);
        let read = |count| {
            done.set(done.get() + count);
            progress(bytes(done.get()), bytes(numbers as u64));
        };
        let stored = scheme.is_some_and(|scheme| checkpoint.quantised_form() == Some(scheme.form));
        if let Some(scheme) = scheme.filter(|scheme| !stored && !scheme.form.can_be_made()) {
            let place = checkpoint.files.first().map(|file| file.display().to_string()).unwrap_or_default();
            let found = checkpoint.quantised_form().map_or("plain numbers".to_string(), |form| form.to_string());
            let what = format!("is stored as {found}, but {} is asked for, which is kept and never made", scheme.form);
            return Err(Error::Model(Fault::new(place, what).hint("name the base that is stored so")));
        }
        let digests = RefCell::default();
        let names = &spec.names;
        let reader = Reader { checkpoint, names, kind, device, scheme, stored, digests: &digests, read: &read };

        let name = spec.names.module(spec.embedding.weight.trim_end_matches(".weight"));
        let embedding = Embedding { name, table: grown(reader.tensor(&spec.embedding.weight)?), trained: None };
        let embedding_norm = reader.optional_norm(spec.embedding.norm.as_ref())?;
        let layer_inputs = spec.layer_inputs.as_ref().map(|inputs| LayerInputs::load(inputs, &reader)).transpose()?;
        let copies = spec.streams.as_ref().map(|streams| Copies::load(streams, &reader)).transpose()?;
        let mut ropes: Vec<Rope> = Vec::new();
        let mut layers: Vec<Layer> = Vec::with_capacity(spec.layers.len());
        for layer in &spec.layers {
            let rotation = match &layer.position {
                Position::Rope(rope) => Some(ropes.iter().position(|known| known == rope).unwrap_or_else(|| {
                    ropes.push(rope.clone());
                    ropes.len() - 1
                })),
                Position::Alibi { .. } | Position::None => None,
            };
            layers.push(Layer::load(layer, rotation, &layers, &reader)?);
        }
        let final_norm = reader.norm(&spec.final_norm)?;
        let bias = if spec.head.bias { Some(grown(reader.tensor(&format!("{}.bias", spec.head.name))?)) } else { None };
        let name = spec.names.module(&spec.head.name);
        // A tied head is the embedding, which is looked up and stays as it is.
        let weight = if spec.head.tied {
            Weight::Dense(embedding.table.shallow_clone())
        } else {
            let weight = reader.weight(&name, &format!("{}.weight", spec.head.name))?;
            match weight.size()[0] < spec.vocab_size {
                true => Weight::Dense(grown(weight.dense())),
                false => weight,
            }
        };
        let head = Linear { name, weight, trained: None, bias, adapter: None };
        Ok(Self {
            spec,
            kind,
            device,
            digests: digests.into_inner(),
            embedding,
            embedding_norm,
            layer_inputs,
            copies,
            layers,
            ropes,
            final_norm,
            head,
        })
    }

    /// The final hidden states (T, D) of documents laid end to end in `ids` (T), i64; `positions` (T), i64, restart at each.
    pub fn hidden(&self, ids: &Tensor, positions: &Tensor, documents: &Documents, forward: Forward<'_>) -> Tensor {
        let reached: Vec<i64> = documents.spans().map(|(_, length)| length).collect();
        let (h, given) = self.given(ids, (positions, &reached), documents, forward);
        let mut flow = Flow::of(h);
        let mut handed_on = HandedOn::default();
        let offload = forward.thrift.offload.then(Offload::default);
        for (i, layer, pass) in self.passes() {
            let again = i < forward.thrift.recomputed_layers;
            let tile = forward.thrift.feed_forward_tile.filter(|_| again || forward.seed.is_none());
            let context = Context { tile, ..given.context(i, layer, pass) };
            flow = if again {
                layer.forward_recomputed(flow, &context, &mut handed_on, offload.as_ref())
            } else {
                layer.forward(flow, &context, &mut handed_on, None)
            };
        }
        forward.balance.inspect(|balance| balance.complete());
        self.finish(flow)
    }

    /// An empty cache for `sequences` sequences.
    pub fn cache(&self, sequences: usize) -> Cache {
        let options = (self.kind, self.device);
        Cache::new(
            sequences,
            self.passes().filter_map(|(_, layer, _)| layer.cache(sequences as i64, options)).collect(),
        )
    }

    /// [`Decoder::hidden`] of new tokens of cached sequences: document i of `documents` continues sequence i. No graph.
    pub fn hidden_cached(&self, ids: &Tensor, documents: &Documents, cache: &mut Cache) -> Tensor {
        tch::no_grad(|| {
            let mut positions = Vec::with_capacity(ids.numel());
            for ((_, new), seen) in documents.spans().zip(&mut cache.lengths) {
                positions.extend(*seen..*seen + new);
                *seen += new;
            }
            let positions = Tensor::from_slice(&positions).to_device(self.device);
            let (h, given) = self.given(ids, (&positions, &cache.lengths), documents, Forward::default());
            let mut flow = Flow::of(h);
            let mut handed_on = HandedOn::default();
            for (i, layer, pass) in self.passes() {
                let cache = &mut cache.layers[layer.cached_in * self.spec.passes + pass];
                flow = layer.forward(flow, &given.context(i, layer, pass), &mut handed_on, Some(cache));
            }
            self.finish(flow)
        })
    }

    /// The blocks in the order the stream goes through them, by their number, and the how-manieth time it is.
    fn passes(&self) -> impl Iterator<Item = (usize, &Layer, usize)> {
        let numbered = self.layers.iter().enumerate();
        numbered.flat_map(|(i, layer)| (0..self.spec.passes).map(move |pass| (i, layer, pass)))
    }

    /// The final hidden states (T, D) of the stream after the last block.
    fn finish(&self, flow: Flow) -> Tensor {
        let flow = match &self.copies {
            Some(copies) => Flow::of(copies.gather(&flow.joined())),
            None => flow,
        };
        flow.ended(&self.final_norm).into_rows()
    }

    /// The logits (S, V), fp32, of hidden states (S, D). No graph.
    pub fn logits(&self, hidden: &Tensor) -> Tensor {
        tch::no_grad(|| {
            let products = ops::projection(hidden, &[self.head.operand(None)], None).remove(0);
            self.spec.head.map.logits(&products)
        })
    }

    /// The summed cross-entropy, times `scale`, of predicting `targets` (S) from the hidden states (S, D).
    pub fn cross_entropy(&self, hidden: &Tensor, targets: &Tensor, forward: Forward<'_>, scale: f64) -> Tensor {
        ops::cross_entropy(hidden, self.head.operand(forward.seed), self.spec.head.map, targets, scale)
    }

    /// Every linear of the model in checkpoint order, the head last.
    pub fn linears(&self) -> Vec<&Linear> {
        let inputs = self.layer_inputs.iter().map(|inputs| &inputs.projection);
        self.layers.iter().flat_map(Layer::linears).chain(inputs).chain([&self.head]).collect()
    }

    /// Every linear of the model in checkpoint order, the head last.
    pub fn linears_mut(&mut self) -> Vec<&mut Linear> {
        let inputs = self.layer_inputs.iter_mut().map(|inputs| &mut inputs.projection);
        self.layers.iter_mut().flat_map(Layer::linears_mut).chain(inputs).chain([&mut self.head]).collect()
    }

    /// Norms whose own numbers can be trained.
    pub fn norms(&self) -> Vec<&Norm> {
        let of_layers = self.layers.iter().flat_map(Layer::norms);
        self.embedding_norm.iter().chain(of_layers).chain([&self.final_norm]).collect()
    }

    /// Norms whose own numbers can be trained.
    pub fn norms_mut(&mut self) -> Vec<&mut Norm> {
        let of_layers = self.layers.iter_mut().flat_map(Layer::norms_mut);
        self.embedding_norm.iter_mut().chain(of_layers).chain([&mut self.final_norm]).collect()
    }

    /// Everything that is trained, fp32 leaves with gradient, under stable names: of the embedding, then of the linears in checkpoint
    /// order, then of norms. A head that shares what is trained of the embedding does not name it again.
    pub fn trained(&self) -> Vec<(String, Tensor)> {
        let own = |name: &str, trained: &Trained| {
            let part = if matches!(trained, Trained::Whole { .. }) { "weight" } else { "rows" };
            let named = [part, "bias"].into_iter().zip(trained.leaves());
            named.map(|(part, leaf)| (format!("{name}.{part}"), leaf.shallow_clone())).collect::<Vec<_>>()
        };
        let embedding = self.embedding.trained.as_ref();
        let mut all: Vec<(String, Tensor)> =
            embedding.map(|trained| own(&self.embedding.name, trained)).unwrap_or_default();
        for linear in self.linears() {
            let shared = |trained: &&Trained| {
                embedding.is_some_and(|other| other.leaf().data_ptr() == trained.leaf().data_ptr())
            };
            let trained = linear.trained.as_ref().filter(|trained| !shared(trained));
            all.extend(trained.into_iter().flat_map(|trained| own(&linear.name, trained)));
            let Some(adapter) = &linear.adapter else { continue };
            let lengths = adapter.magnitude.as_ref().map(|magnitude| ("lengths", &magnitude.lengths));
            let parts = [("a", &adapter.a), ("b", &adapter.b)].into_iter().chain(lengths);
            all.extend(parts.map(|(part, tensor)| (format!("{}.{part}", linear.name), tensor.shallow_clone())));
        }
        for norm in self.norms() {
            let parts = ["weight", "bias"].into_iter().zip(norm.leaves());
            all.extend(parts.map(|(part, leaf)| (format!("{}.{part}", norm.name), leaf.shallow_clone())));
        }
        all
    }

    /// Whether any router takes part in the loss that balances experts.
    pub fn balances_experts(&self) -> bool {
        self.layers.iter().filter_map(Layer::router).any(Router::balances)
    }

    /// Gives the loss that balances experts another coefficient than the config's; 0 is none. False without experts.
    pub fn balance_experts(&mut self, coefficient: f64) -> bool {
        let mut any = false;
        for router in self.layers.iter_mut().filter_map(Layer::router_mut) {
            router.balance(coefficient);
            any = true;
        }
        any
    }

    fn embed(&self, ids: &Tensor, documents: &Documents, forward: Forward<'_>) -> Tensor {
        let h = self.embedding.look_up(ids); // (T, D)
        let h = match self.spec.embedding.scale {
            1.0 => h,
            scale => h * sent(&Tensor::from(scale).to_kind(self.kind), self.device),
        };
        let h = self.embedding_norm.as_ref().map_or_else(|| h.shallow_clone(), |norm| norm.apply(&h));
        let Some(seed) = forward.seed.filter(|_| forward.noise_alpha > 0.0) else { return h };
        let noise = uniform(&h, -1.0, 1.0, seed ^ 0x006e_6f69_7365);
        for (start, length) in documents.spans() {
            let magnitude = forward.noise_alpha / ((length * self.spec.hidden_size) as f64).sqrt();
            let _ = noise.narrow(0, start, length).g_mul_scalar_(magnitude);
        }
        h + noise.to_kind(self.kind)
    }

    /// The embedded tokens (T, D), or copies of them (T, M, D), and what is made once for all blocks. With the positions comes how many
    /// there are of each document with those that `documents` ends with.
    fn given<'a>(
        &self,
        ids: &'a Tensor,
        (positions, reached): (&'a Tensor, &[i64]),
        documents: &'a Documents,
        forward: Forward<'a>,
    ) -> (Tensor, Given<'a>) {
        let h = self.embed(ids, documents, forward);
        let inputs = self.layer_inputs.as_ref().map(|inputs| inputs.of(ids, &h, forward.seed));
        let given = Given {
            documents,
            ids,
            positions,
            rotations: self.ropes.iter().map(|rope| rope.rotation(positions, documents, reached)).collect(),
            inputs: inputs.unwrap_or_default(),
            kind: self.kind,
            dropout_seed: forward.seed,
            balance: forward.balance,
        };
        let h = self.copies.as_ref().map_or_else(|| h.shallow_clone(), |copies| copies.of(&h));
        (h, given)
    }
}

/// What is made once per forward for all blocks.
struct Given<'a> {
    documents: &'a Documents,
    ids: &'a Tensor,
    positions: &'a Tensor,
    rotations: Vec<Rotation>,
    /// (T, P) for each block, where blocks have inputs of their own.
    inputs: Vec<Tensor>,
    kind: Kind,
    dropout_seed: Option<u64>,
    balance: Option<&'a Balance>,
}

impl Given<'_> {
    /// What block i reads in one of its passes, which differ in what is dropped out.
    fn context(&self, i: usize, layer: &Layer, pass: usize) -> Context<'_> {
        Context {
            documents: self.documents,
            ids: self.ids,
            positions: self.positions,
            rotation: layer.rotation.map(|which| &self.rotations[which]),
            input: self.inputs.get(i),
            kind: self.kind,
            dropout_seed: self.dropout_seed.map(|seed| seed.wrapping_add(PASS.wrapping_mul(pass as u64))),
            balance: self.balance,
            tile: None,
        }
    }
}
