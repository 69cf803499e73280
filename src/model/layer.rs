//! One block of the decoder: built from its spec, walked forward.

use tch::{Device, Kind, Tensor};

use super::cache::LayerCache;
use super::linear::{Linear, Weight};
use super::spec::{Attention, FeedForward, LayerSpec, LinearSpec, Mask, NormSpec, Residual};
use crate::Result;
use crate::ops::{self, Activation, Documents, Norm, rope::Rotation};
use crate::weights::Checkpoint;

/// A block with its weights.
#[derive(Debug)]
pub(super) struct Layer {
    heads: i64,
    kv_heads: i64,
    head_size: i64,
    scale: f64,
    mask: Mask,
    activation: Activation,
    /// Which of the decoder's rotations this block uses.
    pub(super) rotation: usize,
    attention_norm: Norm,
    feed_forward_norm: Norm,
    /// Query, key, value.
    qkv: [Linear; 3],
    output: Linear,
    /// Gate, up.
    gate_up: [Linear; 2],
    down: Linear,
}

/// What every block of a forward shares.
pub(super) struct Context<'a> {
    pub(super) documents: &'a Documents,
    pub(super) rotation: &'a Rotation,
    /// Makes the dropout masks; `None` is evaluation.
    pub(super) dropout_seed: Option<u64>,
}

impl Layer {
    pub(super) fn load(spec: &LayerSpec, rotation: usize, read: &Reader<'_>) -> Result<Self> {
        let Attention::Grouped { heads, kv_heads, head_size, scale, query, key, value, output } = &spec.attention;
        let FeedForward::Gated { activation, gate, up, down } = &spec.feed_forward;
        let Residual::Sequential { attention_norm, feed_forward_norm } = &spec.residual;
        Ok(Self {
            heads: *heads,
            kv_heads: *kv_heads,
            head_size: *head_size,
            scale: *scale,
            mask: spec.mask,
            activation: *activation,
            rotation,
            attention_norm: read.norm(attention_norm)?,
            feed_forward_norm: read.norm(feed_forward_norm)?,
            qkv: [read.linear(query)?, read.linear(key)?, read.linear(value)?],
            output: read.linear(output)?,
            gate_up: [read.linear(gate)?, read.linear(up)?],
            down: read.linear(down)?,
        })
    }

    /// The stream (T, D) after this block.
    pub(super) fn forward(&self, h: &Tensor, context: &Context<'_>, cache: Option<&mut LayerCache>) -> Tensor {
        let seed = context.dropout_seed;
        let tokens = h.size()[0];
        let qkv = self.qkv.each_ref().map(|l| l.operand(seed));
        let [q, k, v]: [Tensor; 3] = ops::projection(h, Some(&self.attention_norm), &qkv, None)
            .try_into()
            .expect("three projections give three outputs");
        let q = q.view([tokens, self.heads, self.head_size]); // (T, N, H)
        let k = k.view([tokens, self.kv_heads, self.head_size]); // (T, K, H)
        let v = v.view([tokens, self.kv_heads, self.head_size]); // (T, K, H)
        let (q, k) = ops::rope(&q, &k, context.rotation);
        let attended = match cache {
            None => ops::attention(&q, &k, &v, context.documents, self.scale, self.mask.window()),
            Some(cache) => cache.attend(&q, &k, &v, context.documents, self.scale, self.mask.window()),
        };
        let attended = attended.view([tokens, self.heads * self.head_size]); // (T, N H)
        let h = ops::projection(&attended, None, &[self.output.operand(seed)], Some(h)).remove(0);
        let gate_up = self.gate_up.each_ref().map(|l| l.operand(seed));
        let gate_up = ops::projection(&h, Some(&self.feed_forward_norm), &gate_up, None); // 2 x (T, F)
        ops::gated_projection(self.activation, &gate_up[0], &gate_up[1], self.down.operand(seed), &h)
    }

    /// [`Layer::forward`], keeping only `h` and running again in backward.
    pub(super) fn forward_recomputed(&self, h: &Tensor, context: &Context<'_>) -> Tensor {
        let trained: Vec<&Tensor> = self.linears().into_iter().flat_map(Linear::trained).collect();
        let layer = self.shallow_clone();
        let (documents, rotation) = (context.documents.clone(), context.rotation.shallow_clone());
        let dropout_seed = context.dropout_seed;
        ops::recompute(h, &trained, move |h| {
            layer.forward(h, &Context { documents: &documents, rotation: &rotation, dropout_seed }, None)
        })
    }

    /// Linears in checkpoint order.
    pub(super) fn linears(&self) -> Vec<&Linear> {
        self.qkv.iter().chain([&self.output]).chain(&self.gate_up).chain([&self.down]).collect()
    }

    /// Linears in checkpoint order.
    pub(super) fn linears_mut(&mut self) -> Vec<&mut Linear> {
        self.qkv.iter_mut().chain([&mut self.output]).chain(&mut self.gate_up).chain([&mut self.down]).collect()
    }

    /// (K, H): what a cache must hold per token.
    pub(super) fn cache_shape(&self) -> (i64, i64) {
        (self.kv_heads, self.head_size)
    }

    fn shallow_clone(&self) -> Self {
        Self {
            attention_norm: self.attention_norm.shallow_clone(),
            feed_forward_norm: self.feed_forward_norm.shallow_clone(),
            qkv: self.qkv.each_ref().map(Linear::shallow_clone),
            output: self.output.shallow_clone(),
            gate_up: self.gate_up.each_ref().map(Linear::shallow_clone),
            down: self.down.shallow_clone(),
            ..*self
        }
    }
}

/// Reads weights by their spec; [`super::ModelSpec::prove`] has proved that they are there in their shapes.
pub(super) struct Reader<'a> {
    pub(super) checkpoint: &'a Checkpoint,
    pub(super) kind: Kind,
    pub(super) device: Device,
    /// Called after each tensor with its bytes.
    pub(super) read: &'a dyn Fn(u64),
}

impl Reader<'_> {
    pub(super) fn tensor(&self, name: &str) -> Result<Tensor> {
        let tensor = self.checkpoint.tensor(name, self.kind, self.device)?;
        (self.read)((tensor.numel() * self.kind.elt_size_in_bytes()) as u64);
        Ok(tensor)
    }

    pub(super) fn linear(&self, spec: &LinearSpec) -> Result<Linear> {
        let weight = self.tensor(&format!("{}.weight", spec.name))?;
        let bias = if spec.bias { Some(self.tensor(&format!("{}.bias", spec.name))?) } else { None };
        Ok(Linear { name: spec.name.clone(), weight: Weight::Dense(weight), bias, adapter: None })
    }

    pub(super) fn norm(&self, spec: &NormSpec) -> Result<Norm> {
        Ok(Norm { weight: self.tensor(&spec.weight)?, eps: spec.eps })
    }
}
