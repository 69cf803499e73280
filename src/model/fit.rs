//! Whether a checkpoint is what its config says: every tensor that the spec names, in its shape, and none besides.

use std::collections::BTreeMap;

use super::sites::{Role, Site, expert};
use super::spec::{
    Attention, Branch, CompressedAttention, Compressor, DeltaNet, Entries, ExpertGateUp, ExpertLinear, Experts,
    FeedForward, GateUp, GroupedAttention, LatentAttention, LatentQuery, LayerInput, LayerInputs, LinearSpec,
    ModelSpec, NormSpec, Projection, QueryKeyNorm, Residual, Routing, Stored, StreamMap, StreamMix, Streams,
};
use crate::weights::Checkpoint;
use crate::{Error, Fault, Result};

/// How many tensors an error names of each kind.
const NAMED: usize = 4;

impl ModelSpec {
    /// Every tensor the decoder reads, by its name in the spec, with its shape.
    pub fn tensors(&self) -> BTreeMap<String, Vec<i64>> {
        self.inventory().tensors
    }

    /// Whether a step's products have few shapes: not where experts have as many rows as they are sent, and where attention goes by
    /// other pieces than whole documents.
    pub fn has_few_shapes(&self) -> bool {
        let experts = self.sites().iter().any(|site| matches!(site.role, Role::Experts { .. }));
        !experts && self.layers.iter().all(|layer| matches!(layer.attention, Attention::Grouped(_)))
    }

    /// Every linear, in checkpoint order, the head last.
    pub fn sites(&self) -> Vec<Site> {
        let mut sites = self.inventory().sites;
        for site in &mut sites {
            site.name = self.names.module(&site.name);
            if let Role::Experts { parameter, .. } = &mut site.role {
                *parameter = self.names.module(parameter);
            }
        }
        sites
    }

    /// The tensors that are computed with in fp32, as they are stored, whatever type the other numbers are rounded to: norms, sinks, what
    /// paces a recurrence, maps of streams, and routers where the model has them so.
    pub fn wide_tensors(&self) -> Vec<String> {
        self.inventory().wide
    }

    /// Norms whose own numbers can be trained: those around the halves of blocks, of queries and keys, of the embedding, and the last.
    pub fn trainable_norms(&self) -> Vec<&NormSpec> {
        let of_layers = self.layers.iter().flat_map(|layer| {
            let around = match &layer.residual {
                Residual::Sequential { attention, feed_forward, .. } => {
                    vec![&attention.before, &attention.after, &feed_forward.before, &feed_forward.after]
                        .into_iter()
                        .flatten()
                        .collect()
                }
                Residual::Parallel { norm, feed_forward_norm } => [norm].into_iter().chain(feed_forward_norm).collect(),
                Residual::Streams { .. } => Vec::new(),
            };
            let of_heads = match &layer.attention {
                Attention::Grouped(grouped) => grouped.query_key_norm.as_ref(),
                Attention::Latent(_) | Attention::DeltaNet(_) | Attention::Compressed(_) => None,
            };
            around
                .into_iter()
                .chain(of_heads.into_iter().flat_map(|norms| [&norms.query].into_iter().chain(&norms.key)))
        });
        let all = self.embedding.norm.iter().chain(of_layers).chain([&self.final_norm]);
        all.filter(|norm| norm.module().is_some()).collect()
    }

    /// Of a checkpoint that is stored quantised, the linears whose weights are plain numbers there.
    pub fn left_plain(&self, checkpoint: &Checkpoint) -> Vec<String> {
        let plain = |path: &String| {
            let stored = self.names.stored_as(path, |name| checkpoint.shape(name).is_some());
            !checkpoint.is_quantised(&stored)
        };
        let sites = self.sites().into_iter().filter(|site| site.role != Role::Router);
        sites.filter(|site| site.parameters().iter().any(plain)).map(|site| site.name).collect()
    }

    fn inventory(&self) -> Inventory {
        let mut all = Inventory::default();
        all.add(self.embedding.weight.clone(), &[self.vocab_size, self.hidden_size]);
        self.embedding.norm.iter().for_each(|norm| all.norm(norm));
        for layer in &self.layers {
            all.attention(&layer.attention);
            all.feed_forward(&layer.feed_forward, self.vocab_size);
            match &layer.residual {
                Residual::Sequential { attention, feed_forward, .. } => {
                    let norms = [&attention.before, &attention.after, &feed_forward.before, &feed_forward.after];
                    norms.into_iter().flatten().for_each(|norm| all.norm(norm));
                }
                Residual::Parallel { norm, feed_forward_norm } => {
                    [Some(norm), feed_forward_norm.as_ref()].into_iter().flatten().for_each(|norm| all.norm(norm));
                }
                Residual::Streams { attention, feed_forward } => {
                    for StreamMix { count, map, norm, .. } in [attention, feed_forward].map(|mix| &**mix) {
                        all.stream_map(map, &[*count, *count, count * count], count * self.hidden_size);
                        all.norm(norm);
                    }
                }
            }
            if let Some(LayerInput { gate, projection, norm, .. }) = &layer.ending.input {
                [gate, projection].into_iter().for_each(|linear| all.linear(linear));
                all.norm(norm);
            }
            layer.ending.scale.iter().for_each(|name| all.add(name.clone(), &[1]));
        }
        if let Some(LayerInputs { table, rows, projection, norm, .. }) = &self.layer_inputs {
            all.add(table.clone(), &[*rows, projection.output]);
            all.linear(projection);
            all.norm(norm);
        }
        if let Some(Streams { count, gather, .. }) = &self.streams {
            all.stream_map(gather, &[*count], count * self.hidden_size);
        }
        all.norm(&self.final_norm);
        if !self.head.tied {
            all.add(format!("{}.weight", self.head.name), &[self.vocab_size, self.hidden_size]);
        }
        if self.head.bias {
            all.add(format!("{}.bias", self.head.name), &[self.vocab_size]);
        }
        let shape = (self.vocab_size, self.hidden_size);
        all.sites.push(Site { name: self.head.name.clone(), shape, role: Role::Head });
        all
    }

    /// Proves that `checkpoint` holds these tensors in these shapes, and nothing that would silently be left out of the
    /// computation.
    ///
    /// # Errors
    /// [`Error::Model`] listing what is missing, has another shape, or is not accounted for by `config.json`.
    pub fn prove(&self, checkpoint: &Checkpoint) -> Result<()> {
        let stored = |(name, shape): (String, Vec<i64>)| (self.names.stored(&name), shape);
        let wanted: BTreeMap<String, Vec<i64>> = self.tensors().into_iter().map(stored).collect();
        let mut missing = Vec::new();
        let mut misshapen = Vec::new();
        for (name, shape) in &wanted {
            match checkpoint.shape(name) {
                None => missing.push(name.clone()),
                Some(found) if &found != shape => {
                    misshapen.push(format!("{name} is {found:?} in the file, {shape:?} by config.json"));
                }
                Some(_) => {}
            }
        }
        let head = self.names.stored(&format!("{}.weight", self.head.name));
        let unused: Vec<String> = checkpoint
            .names()
            .into_iter()
            .filter(|name| !wanted.contains_key(*name))
            // A checkpoint may store a tied head a second time.
            .filter(|name| !(self.head.tied && *name == head))
            .filter(|name| !self.names.is_other_part(name) && !checkpoint.is_spare(name))
            .filter(|name| !self.ignored_suffixes.iter().any(|suffix| name.ends_with(suffix.as_str())))
            .filter(|name| !self.ignored_prefixes.iter().any(|prefix| name.starts_with(prefix)))
            .map(ToString::to_string)
            .collect();
        let place = checkpoint.files.first().map(|file| file.display().to_string()).unwrap_or_default();
        let faults = [
            (
                missing,
                "lacks",
                "that config.json asks for",
                "is the download complete, and does config.json belong to these weights?",
            ),
            (misshapen, "has", "of another shape", "config.json and the weights do not belong together"),
            (
                unused,
                "holds",
                "that config.json does not account for: the model would be computed without them",
                "does config.json belong to these weights? Look for a flag it lacks (attention_bias, num_hidden_layers)",
            ),
        ];
        let found = faults.into_iter().find(|(names, ..)| !names.is_empty());
        found.map_or(Ok(()), |(names, verb, what, hint)| {
            let count = names.len();
            let (few, more) = (names[..count.min(NAMED)].join(", "), if count > NAMED { ", ..." } else { "" });
            Err(Error::Model(Fault::new(place, format!("{verb} {count} tensor(s) {what}: {few}{more}")).hint(hint)))
        })
    }
}

/// Tensors by name, and the linears among them.
#[derive(Default)]
struct Inventory {
    tensors: BTreeMap<String, Vec<i64>>,
    /// Those of [`ModelSpec::wide_tensors`].
    wide: Vec<String>,
    sites: Vec<Site>,
}

impl Inventory {
    fn add(&mut self, name: String, shape: &[i64]) {
        self.tensors.insert(name, shape.to_vec());
    }

    fn add_wide(&mut self, name: String, shape: &[i64]) {
        self.wide.push(name.clone());
        self.add(name, shape);
    }

    fn feed_forward(&mut self, spec: &FeedForward, vocab_size: i64) {
        match spec {
            FeedForward::Plain { up, down, .. } => [up, down].into_iter().for_each(|linear| self.linear(linear)),
            FeedForward::Gated { projection, down, .. } => {
                match projection {
                    GateUp::Separate { gate, up } => [gate, up].into_iter().for_each(|linear| self.linear(linear)),
                    GateUp::Fused(linear) => self.linear(linear),
                }
                self.linear(down);
            }
            FeedForward::Experts(experts) => self.experts(experts, vocab_size),
            FeedForward::Sum(branches) => {
                for Branch { norms, feed_forward } in branches {
                    [&norms.before, &norms.after].into_iter().flatten().for_each(|norm| self.norm(norm));
                    self.feed_forward(feed_forward, vocab_size);
                }
            }
        }
    }

    fn experts(&mut self, Experts { router, projection, down, shared, .. }: &Experts, vocab_size: i64) {
        self.linear_as(&router.linear, Role::Router);
        if router.wide {
            self.wide.push(format!("{}.weight", router.linear.name));
            self.wide.extend(router.linear.bias.then(|| format!("{}.bias", router.linear.name)));
        }
        router.norm.iter().for_each(|own| self.norm(&own.norm));
        match &router.routing {
            Routing::Largest { correction, expert_scale, .. } => {
                let of_experts = [correction, expert_scale].into_iter().flatten();
                of_experts.for_each(|name| self.add_wide(name.clone(), &[router.linear.output]));
            }
            Routing::OfToken { chosen, table, .. } => self.add(table.clone(), &[vocab_size, *chosen]),
            Routing::SparseMixer { .. } => {}
        }
        match projection {
            ExpertGateUp::Separate { gate, up } => [gate, up].into_iter().for_each(|linear| self.expert_linear(linear)),
            ExpertGateUp::Fused { linear, .. } => self.expert_linear(linear),
        }
        self.expert_linear(down);
        if let Some(shared) = shared {
            self.feed_forward(&shared.feed_forward, vocab_size);
            shared.gate.iter().for_each(|gate| self.linear(gate));
        }
    }

    fn expert_linear(&mut self, spec: &ExpertLinear) {
        let ExpertLinear { name, experts, input, output, bias, .. } = spec;
        match spec.stored {
            Stored::Apart => {
                for number in 0..*experts {
                    let module = expert(name, number);
                    self.add(format!("{module}.weight"), &[*output, *input]);
                    if *bias {
                        self.add(format!("{module}.bias"), &[*output]);
                    }
                }
            }
            Stored::Together | Stored::Transposed { .. } => {
                let shape = if spec.stored == Stored::Together { [*output, *input] } else { [*input, *output] };
                self.add(name.clone(), &[*experts, shape[0], shape[1]]);
                if *bias {
                    self.add(format!("{name}_bias"), &[*experts, *output]);
                }
            }
        }
        self.sites.push(Site::of_experts(spec));
    }

    fn linear(&mut self, spec: &LinearSpec) {
        self.linear_as(spec, Role::Linear);
    }

    fn linear_as(&mut self, spec: &LinearSpec, role: Role) {
        self.sites.push(Site::of(spec, role));
        self.add(format!("{}.weight", spec.name), &[spec.output, spec.input]);
        if spec.bias {
            self.add(format!("{}.bias", spec.name), &[spec.output]);
        }
    }

    fn attention(&mut self, spec: &Attention) {
        match spec {
            Attention::Grouped(grouped) => self.grouped(grouped),
            Attention::DeltaNet(net) => self.delta_net(net),
            Attention::Compressed(compressed) => self.compressed(compressed),
            Attention::Latent(LatentAttention { query, down, norm, up, output, .. }) => {
                match query {
                    LatentQuery::Direct(linear) => self.linear(linear),
                    LatentQuery::LowRank { down, norm, up } => {
                        [down, up].into_iter().for_each(|linear| self.linear(linear));
                        self.norm(norm);
                    }
                }
                [down, up, output].into_iter().for_each(|linear| self.linear(linear));
                self.norm(norm);
            }
        }
    }

    /// Numbers of so many `kinds`, each with a factor of its own, of `input` numbers.
    fn stream_map(&mut self, spec: &StreamMap, kinds: &[i64], input: i64) {
        let numbers = kinds.iter().sum();
        self.add_wide(spec.function.clone(), &[numbers, input]);
        self.add_wide(spec.base.clone(), &[numbers]);
        self.add_wide(spec.scale.clone(), &[kinds.len() as i64]);
    }

    fn compressed(&mut self, spec: &CompressedAttention) {
        [&spec.query_down, &spec.query_up, &spec.key_value].into_iter().for_each(|linear| self.linear(linear));
        let norms = [&spec.query_norm, &spec.query_head_norm, &spec.key_value_norm];
        norms.into_iter().for_each(|norm| self.norm(norm));
        self.add_wide(spec.sinks.clone(), &[spec.heads]);
        match &spec.entries {
            Entries::None => {}
            Entries::All(compressor) => self.compressor(compressor, Role::Linear),
            Entries::Chosen { compressor, indexer } => {
                self.compressor(compressor, Role::Linear);
                self.compressor(&indexer.compressor, Role::Indexer);
                [&indexer.query, &indexer.weights].into_iter().for_each(|linear| self.linear_as(linear, Role::Indexer));
            }
        }
        self.linear_as(&spec.group, Role::Blocks);
        self.linear(&spec.output);
    }

    fn compressor(&mut self, spec: &Compressor, role: Role) {
        self.linear_as(&spec.key_value, role.clone());
        self.linear_as(&spec.gate, role);
        self.add_wide(spec.bias.clone(), &[spec.rate, spec.gate.output]);
        self.norm(&spec.norm);
    }

    fn grouped(&mut self, spec: &GroupedAttention) {
        match &spec.projection {
            Projection::Separate { query, key, value } | Projection::Gated { query_gate: query, key, value } => {
                [query, key, value].into_iter().for_each(|linear| self.linear(linear));
            }
            Projection::ValuesAreKeys { query, key } => {
                [query, key].into_iter().for_each(|linear| self.linear(linear));
            }
            Projection::QueryOnly { query: linear, .. } | Projection::Fused(linear) | Projection::PerHead(linear) => {
                self.linear(linear);
            }
        }
        self.linear(&spec.output);
        if let Some(QueryKeyNorm { query, key, .. }) = &spec.query_key_norm {
            [Some(query), key.as_ref()].into_iter().flatten().for_each(|norm| self.norm(norm));
        }
        spec.value_norm.iter().for_each(|norm| self.norm(norm));
        spec.sinks.iter().for_each(|sinks| self.add_wide(sinks.clone(), &[spec.heads]));
    }

    fn delta_net(&mut self, spec: &DeltaNet) {
        spec.projection.linears().into_iter().for_each(|linear| self.linear(linear));
        let channels = 2 * spec.key_heads * spec.key_size + spec.value_heads * spec.value_size;
        self.add_wide(spec.convolution.clone(), &[channels, 1, spec.taps]);
        self.add_wide(spec.pace.clone(), &[spec.value_heads]);
        self.add_wide(spec.bias.clone(), &[spec.value_heads]);
        self.norm(&spec.norm);
        self.linear(&spec.output);
    }

    fn norm(&mut self, spec: &NormSpec) {
        spec.weights.iter().chain(&spec.bias).for_each(|name| self.add_wide(name.clone(), &spec.shape));
    }
}
