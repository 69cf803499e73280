//! How near each operation on CUDA comes to the speed of memory, or of a product where it computes more than it moves: a table for a machine
//! with a GPU, at the shapes of an 8B model. Without one it is made at small shapes on the emulated GPU, to see that all of it runs.

use std::cell::RefCell;
use std::time::Instant;

use tch::{Device, Kind, Tensor};

use super::emulator::{emulated, gpu, launched, plainly};
use super::*;
use crate::ops::cross_entropy::{cross_entropy, softmax};
use crate::ops::norm::tests::frozen;
use crate::ops::rope::{RopeLayout, Rotation};
use crate::ops::{Activation, Documents, LogitMap, LowRank, Norm, Operand, Scoring, attention, projection};
use crate::quant::{FourBit, FourBitType, Fp8, Grouped, Int8, Mxfp4, Weight};
use crate::torch_ext::{self, AdamW};

/// What a table is made for.
struct Sizes {
    tokens: i64,
    width: i64,
    hidden: i64,
    heads: i64,
    kv_heads: i64,
    head: i64,
    vocabulary: i64,
    rank: i64,
    /// Adapters of as many numbers as a model of so many blocks has.
    blocks: i64,
    /// How often each is run in a round, and how many rounds there are.
    runs: (usize, usize),
}

const LARGE: Sizes = Sizes {
    tokens: 8192,
    width: 4096,
    hidden: 14336,
    heads: 32,
    kv_heads: 8,
    head: 128,
    vocabulary: 128_256,
    rank: 16,
    blocks: 32,
    runs: (20, 5),
};

const SMALL: Sizes = Sizes {
    tokens: 16,
    width: 64,
    hidden: 96,
    heads: 4,
    kv_heads: 2,
    head: 16,
    vocabulary: 96,
    rank: 4,
    blocks: 1,
    runs: (1, 1),
};

#[test]
#[ignore = "measures a GPU: `make device-check` runs it"]
fn beside_a_copy() {
    let device = gpu().expect("a GPU: this is for machines that have one");
    Table::new(device, LARGE).fill();
}

#[test]
fn every_row_of_the_table_runs_and_meets_every_kernel() {
    launched();
    emulated(|| Table::new(Device::Cpu, SMALL).fill());
    let met = launched();
    for source in &SOURCES {
        // Of sizes that are no multiple of sixteen bytes, and of other codes of four bits, a row would say nothing more.
        for kernel in source.kernels.iter().filter(|kernel| !kernel.ends_with("_odd")) {
            let bf16 = format!("{kernel}_bf16");
            assert!(met.contains(&bf16), "{bf16} has no row");
        }
    }
}

struct Table {
    device: Device,
    sizes: Sizes,
    /// Bytes that a copy reads and writes in a second.
    copy: f64,
    /// Operations that a product in bf16 makes in a second.
    product: f64,
}

impl Table {
    fn new(device: Device, sizes: Sizes) -> Self {
        let mut table = Self { device, sizes, copy: 1.0, product: 1.0 };
        let Sizes { tokens, width, hidden, .. } = table.sizes;
        let (from, to) = (table.bf16(&[hidden, 4 * width]), RefCell::new(table.bf16(&[hidden, 4 * width])));
        table.copy = 4.0 * from.numel() as f64 / table.seconds(&|| to.borrow_mut().copy_(&from));
        table.say(&format!("{:<40} {:>9.0} GB/s", "copy", table.copy / 1e9));
        let (x, weight) = (table.bf16(&[tokens, width]), table.bf16(&[hidden, width]));
        let operations = 2.0 * (tokens * width * hidden) as f64;
        table.product = operations / table.seconds(&|| drop(x.mm(&weight.tr())));
        table.say(&format!("{:<40} {:>9.1} TFLOP/s", "product", table.product / 1e12));
        table
    }

    fn fill(&self) {
        self.weights();
        self.norms();
        self.heads();
        self.feed_forward();
        self.linears();
        self.losses();
        self.updates();
    }

    fn weights(&self) {
        let weight = self.bf16(&[self.sizes.hidden, self.sizes.width]);
        let numbers = weight.numel() as f64;
        for (nested, block) in [(false, 64), (true, 64), (true, 256)] {
            let four_bit = FourBit::of(&weight, FourBitType::Nf4, block, nested);
            let scales = if nested { 1.0 + 4.0 / 256.0 } else { 4.0 };
            let bytes = numbers * (0.5 + scales / block as f64 + 2.0);
            self.both(&format!("nf4 made whole, {block}, nested {nested}"), bytes, &|| drop(four_bit.dequantised()));
        }
        self.row("nf4 made", numbers * 2.5, &|| drop(FourBit::of(&weight, FourBitType::Nf4, 64, false)));
        let int8 = Int8::of(&weight);
        self.both("int8 made whole", numbers * 3.0, &|| drop(int8.dequantised()));
        let fp8 = Fp8::of(&weight);
        self.both("fp8 rows made whole", numbers * 3.0, &|| drop(fp8.dequantised()));
        self.row("fp8 rows made", numbers * 3.0, &|| drop(Fp8::of(&weight)));
        let codes = |columns| Tensor::randint(256, [self.sizes.hidden, columns], (Kind::Uint8, self.device));
        let (columns, group) = (self.sizes.width, 32);
        let grouped = Grouped {
            columns,
            bits: 4,
            group,
            kind: Kind::BFloat16,
            codes: codes(columns / 2),
            scales: Tensor::ones([self.sizes.hidden, columns / group], (Kind::Half, self.device)),
            zeros: None,
            order: None,
        };
        self.both("four bits in groups made whole", numbers * 2.5625, &|| drop(grouped.dequantised()));
        let mxfp4 = Mxfp4 { kind: Kind::BFloat16, codes: codes(columns / 2), exponents: codes(columns / 32) };
        self.both("mxfp4 made whole", numbers * 2.53125, &|| drop(mxfp4.dequantised()));
    }

    fn norms(&self) {
        let [x, dy, given] = [(); 3].map(|()| self.stream());
        let norm = |bias, centred| frozen(self.fp32(&[1, self.sizes.width]), bias, 1e-5, centred);
        let elements = x.numel() as f64;
        let kinds: [(&str, Norm); 2] =
            [("RMSNorm", norm(None, false)), ("LayerNorm", norm(Some(self.fp32(&[self.sizes.width])), true))];
        for (name, norm) in kinds {
            let (_, stats) = norm.forward(&x);
            self.both(name, elements * 4.0, &|| drop(norm.forward(&x)));
            self.row(&format!("{name}, again"), elements * 4.0, &|| drop(norm.again(&x, &stats)));
            self.both(&format!("{name}, backward"), elements * 6.0, &|| drop(norm.backward(&dy, &x, &stats, None)));
            self.both(&format!("{name} of residual + given"), elements * 8.0, &|| {
                drop(norm.forward_of_sum(&x, Some((&given, 1.0))));
            });
            self.both(&format!("{name}, backward, onto the residual's"), elements * 8.0, &|| {
                drop(norm.backward(&dy, &x, &stats, Some(&given)));
            });
        }
    }

    fn heads(&self) {
        let Sizes { tokens, heads, kv_heads, head, .. } = self.sizes;
        let [q, k, v] = [heads, kv_heads, kv_heads].map(|heads| self.bf16(&[tokens, heads, head]));
        let angle = self.fp32(&[tokens, head / 2]);
        let (cos, sin) = (angle.cos(), angle.sin());
        let bytes = (q.numel() + k.numel()) as f64 * 2.0;
        let norm = frozen(self.fp32(&[1, head]), None, 1e-6, false);
        for (name, layout) in [("halves", RopeLayout::Halves), ("pairs", RopeLayout::Pairs)] {
            let rotation = Rotation { layout, cos: cos.shallow_clone(), sin: sin.shallow_clone() };
            self.both(&format!("RoPE of q and k, {name}"), bytes * 2.0, &|| {
                drop(crate::ops::rope([&q, &k], &rotation));
            });
            let normed = || crate::ops::normed_rope([&q, &k], [&norm, &norm], &rotation);
            self.both(&format!("q and k normed, and RoPE, {name}"), bytes * 2.0, &|| drop(normed()));
            let angles = Angles { pairs: layout == RopeLayout::Pairs, cos: &cos, sin: &sin };
            let of = |x| NormedHeads { x, weight: &norm.weight, eps: 1e-6, centred: false, first: 0 };
            self.row("  backward", bytes * 3.0, &|| {
                drop(norm_and_rotate_backward(&[&q, &k], &[of(&q), of(&k)], angles));
            });
        }

        let scoring = Scoring::scaled((head as f64).powf(-0.5));
        for (name, parts) in [("one document", 1), ("eight documents", 8)] {
            let documents = Documents { offsets: (0..=parts).map(|i| i * tokens / parts).collect() };
            let leaves = [&q, &k, &v].map(|x| x.detach().set_requires_grad(true));
            // Half of each document's scores, twice two operations for each of a head's numbers.
            let forward = 2.0 * (tokens * (tokens / parts) * heads * head) as f64;
            let attend = |[q, k, v]: [&Tensor; 3]| attention(q, k, v, &documents, &scoring);
            self.computed(&format!("flash varlen, {name}"), forward, &|| drop(attend([&q, &k, &v])));
            self.computed(&format!("flash varlen, {name}, both ways"), 3.5 * forward, &|| {
                attend(leaves.each_ref()).sum(Kind::Float).backward();
            });
        }
    }

    fn feed_forward(&self) {
        let [gate, up, dy] = [(); 3].map(|()| self.bf16(&[self.sizes.tokens, self.sizes.hidden]));
        let elements = gate.numel() as f64;
        for (name, activation) in [("SwiGLU", Activation::Silu), ("GeGLU", Activation::GeluTanh)] {
            self.both(name, elements * 6.0, &|| drop(activation.gated(&gate, Some(&up))));
            self.both(&format!("{name}, backward"), elements * 12.0, &|| {
                drop(activation.gated_backward(&dy, &gate, Some(&up), false));
            });
        }
        // What comes out goes in again: a time, not a result.
        self.row("SwiGLU, backward in place", elements * 12.0, &|| {
            drop(Activation::Silu.gated_backward(&dy, &gate, Some(&up), true));
        });
    }

    /// Products with low-rank updates, beside the same without.
    fn linears(&self) {
        let Sizes { width, hidden, rank, tokens, heads, kv_heads, head, .. } = self.sizes;
        let x = self.stream().set_requires_grad(true);
        let (queries, keys) = (heads * head, kv_heads * head);
        for (name, outputs) in [("q, k and v", vec![queries, keys, keys]), ("gate and up", vec![hidden, hidden])] {
            let weights: Vec<Weight> = outputs.iter().map(|out| Weight::from(self.bf16(&[*out, width]))).collect();
            let leaf = |shape: &[i64]| (self.fp32(shape) * 0.01).set_requires_grad(true);
            let low_ranks: Vec<LowRank> = outputs
                .iter()
                .map(|out| LowRank {
                    a: leaf(&[rank, width]),
                    b: leaf(&[*out, rank]),
                    scale: 1.0,
                    dropout: 0.0,
                    magnitude: None,
                })
                .collect();
            let operations = 4.0 * (tokens * width * outputs.iter().sum::<i64>()) as f64;
            for adapted in [false, true] {
                let operands: Vec<Operand<'_>> = weights
                    .iter()
                    .zip(&low_ranks)
                    .map(|(weight, low_rank)| Operand {
                        weight,
                        trained: None,
                        bias: None,
                        low_rank: adapted.then_some(low_rank),
                        dropout_seed: None,
                    })
                    .collect();
                let name = format!("{name}, {}, both ways", if adapted { "adapted" } else { "bare" });
                self.computed(&name, operations, &|| {
                    let outputs = projection(&x, &operands, None);
                    let grads: Vec<&Tensor> = outputs.iter().collect();
                    drop(torch_ext::gradients(&grads, &grads, &[&x]));
                });
            }
        }
    }

    fn losses(&self) {
        let Sizes { width, vocabulary, tokens, .. } = self.sizes;
        let products = self.bf16(&[128, vocabulary]);
        let targets = Tensor::zeros([128], (Kind::Int64, self.device));
        self.both("softmax, cross-entropy and gradient", products.numel() as f64 * 4.0, &|| {
            drop(softmax(&products, LogitMap::PLAIN, &targets, 1.0, Some(Kind::BFloat16)));
        });
        let wide = products.to_kind(Kind::Float);
        self.both("  of logits in fp32", wide.numel() as f64 * 6.0, &|| {
            drop(softmax(&wide, LogitMap::PLAIN, &targets, 1.0, Some(Kind::BFloat16)));
        });
        let head = Weight::from(self.bf16(&[vocabulary, width]));
        let operand = Operand { weight: &head, trained: None, bias: None, low_rank: None, dropout_seed: None };
        let rows = tokens / 4;
        let hidden = self.bf16(&[rows, width]).set_requires_grad(true);
        let targets = Tensor::zeros([rows], (Kind::Int64, self.device));
        self.computed("cross-entropy in chunks, with the head", 4.0 * (rows * width * vocabulary) as f64, &|| {
            drop(cross_entropy(&hidden, operand, LogitMap::PLAIN, &targets, 1.0));
        });
    }

    fn updates(&self) {
        let Sizes { width, hidden, rank, blocks, .. } = self.sizes;
        let shapes = (0..blocks).flat_map(|_| [width, width, width, width, hidden, hidden, width]);
        let tensors: Vec<Tensor> =
            shapes.flat_map(|out| [[rank, width], [out, rank]]).map(|shape| self.fp32(&shape)).collect();
        let of = |make: &dyn Fn(&Tensor) -> Tensor| tensors.iter().map(make).collect::<Vec<_>>();
        let (gradients, means, squares) = (of(&|t| t * 0.01), of(&Tensor::zeros_like), of(&Tensor::zeros_like));
        let steps = of(&|_| Tensor::ones([], (Kind::Float, self.device)));
        let numbers: f64 = tensors.iter().map(|tensor| tensor.numel() as f64).sum();
        self.row("clipping: the divisor of all gradients", numbers * 4.0, &|| {
            drop((torch_ext::global_norm(&gradients) + 1e-6).clamp_min(1.0));
        });
        let settings = AdamW { learning_rate: 1e-4, beta1: 0.9, beta2: 0.999, weight_decay: 0.01, epsilon: 1e-8 };
        let (divisor, skip) = (steps[0].copy(), steps[0].zeros_like());
        // Parameters, gradients and both moments are read and written.
        self.row("fused AdamW of all adapters", numbers * 32.0, &|| {
            let guard = Some((&divisor, &skip));
            torch_ext::fused_adamw_(&tensors, &gradients, &means, &squares, &steps, settings, guard)
                .expect("an update");
        });
    }

    fn stream(&self) -> Tensor {
        self.bf16(&[self.sizes.tokens, self.sizes.width])
    }

    fn bf16(&self, shape: &[i64]) -> Tensor {
        self.fp32(shape).to_kind(Kind::BFloat16)
    }

    fn fp32(&self, shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, self.device))
    }

    /// Seconds of one call: the median of some rounds, the first of which does not count.
    fn seconds(&self, run: &dyn Fn()) -> f64 {
        let wait = || {
            if let Device::Cuda(index) = self.device {
                tch::Cuda::synchronize(index as i64);
            }
        };
        let (runs, rounds) = self.sizes.runs;
        let mut seconds: Vec<f64> = (0..=rounds)
            .map(|_| {
                wait();
                let began = Instant::now();
                (0..runs).for_each(|_| run());
                wait();
                began.elapsed().as_secs_f64() / runs as f64
            })
            .skip(1)
            .collect();
        seconds.sort_by(f64::total_cmp);
        seconds[rounds / 2]
    }

    /// What moves so many bytes.
    fn row(&self, name: &str, bytes: f64, run: &dyn Fn()) {
        let rate = bytes / self.seconds(run);
        self.say(&format!("{name:<40} {:>9.0} GB/s  {:>5.1} % of a copy", rate / 1e9, 100.0 * rate / self.copy));
    }

    /// [`Table::row`], and that of the twin.
    fn both(&self, name: &str, bytes: f64, run: &dyn Fn()) {
        self.row(name, bytes, run);
        self.row("  its twin", bytes, &|| plainly(run));
    }

    /// What makes so many operations.
    fn computed(&self, name: &str, operations: f64, run: &dyn Fn()) {
        let rate = operations / self.seconds(run);
        let share = 100.0 * rate / self.product;
        self.say(&format!("{name:<40} {:>9.1} TFLOP/s {share:>5.1} % of a product", rate / 1e12));
    }

    /// Of an emulated GPU a speed says nothing.
    fn say(&self, line: &str) {
        if self.device != Device::Cpu {
            println!("{line}");
        }
    }
}
