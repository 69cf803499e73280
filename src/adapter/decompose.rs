//! Starts that are taken from the weight itself: PiSSA (arXiv:2404.02948), OLoRA (arXiv:2406.01775) and LoftQ (arXiv:2310.08659), as
//! PEFT 0.21.2 makes them.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::init;
use super::load::PREFIX;
use super::targets::Target;
use crate::model::sites::{Role, Site};
use crate::model::spec::Stored;
use crate::model::{Decoder, Linear};
use crate::quant::{Scheme, Weight};
use crate::recipe::{AdapterRecipe, InitLora};
use crate::weights::Checkpoint;
use crate::{Error, Fault, Result};

/// A (R, in) and B (out, R), fp32.
type Pair = (Tensor, Tensor);

/// Where a model's weights came from, and what became of them.
pub struct Origin<'a> {
    /// The base's files.
    pub checkpoint: &'a Checkpoint,
    /// How the weights of linears are kept.
    pub scheme: Option<&'a Scheme>,
    /// What an earlier part of this run started with ([`super::Adapters::start`]): it is not worked out again, so that a run goes on
    /// with the very numbers.
    pub start: Option<Vec<(String, Tensor)>>,
    /// Called with how many modules have started and how many there are.
    pub progress: &'a dyn Fn(u64, u64),
}

/// The weights that starts are taken from.
pub(super) struct Originals<'a> {
    origin: Option<&'a Origin<'a>>,
    /// The modules whose weights are kept as the scheme says, and how their files call these.
    quantised: HashMap<String, Vec<String>>,
    kind: Kind,
}

impl<'a> Originals<'a> {
    pub(super) fn of(model: &Decoder, origin: Option<&'a Origin<'a>>) -> Self {
        let spec = &model.spec;
        let quantised = origin.and_then(|origin| Some((origin.checkpoint, origin.scheme?)));
        let quantised = quantised.map_or_else(HashMap::new, |(checkpoint, scheme)| {
            let sites = spec.sites().into_iter();
            let kept = sites.filter(|site| site.quantisable(spec.head.tied) && !scheme.skips(&site.name));
            let stored = |path: &String| spec.names.stored_as(path, |name| checkpoint.shape(name).is_some());
            kept.map(|site| (site.name.clone(), site.parameters().iter().map(stored).collect())).collect()
        });
        Self { origin, quantised, kind: model.kind }
    }

    pub(super) fn progress(&self, done: usize, all: usize) {
        if let Some(origin) = self.origin {
            (origin.progress)(done as u64, all as u64);
        }
    }

    /// A and B of a module as `recipe` has them start, and the same once more where they were taken off the linear's weight.
    pub(super) fn start(
        &self,
        site: &Site,
        linear: &mut Linear,
        target: &Target,
        recipe: &AdapterRecipe,
        seed: u64,
    ) -> Result<(Tensor, Tensor, Option<Pair>)> {
        let (rows, columns) = site.shape;
        let r = i64::from(target.r);
        if r > rows.min(columns) {
            let what = format!("{} is {rows} x {columns}, which has no {r} directions to start from", site.name);
            let fault = Fault::new("adapter.r", what).hint("lower it there: adapter.rank_pattern");
            return Err(Error::Recipe(vec![fault]));
        }
        let scheme = self.scheme(&site.name);
        let makes_up = recipe.init_lora_weights == InitLora::Loftq;
        if let Some(scheme) = scheme.filter(|s| (recipe.takes_off() || makes_up) && !s.form.can_be_made()) {
            let form = scheme.form;
            let what = match makes_up {
                true => format!(
                    "makes up for what the base lost, which is stored as {form}: what it was before is not known"
                ),
                false => {
                    format!("takes something off the base, which is stored as {form} and cannot be stored so again")
                }
            };
            let fault = Fault::new("adapter.init_lora_weights", what);
            return Err(Error::Recipe(vec![fault.hint("choose another start, or a base that is not quantised")]));
        }
        let whole = self.whole(site, linear)?;
        let known = match self.origin.and_then(|origin| origin.start.as_ref()) {
            Some(start) => Some(found(start, &site.name)?),
            None => None,
        };
        let (a, b) = known.map_or_else(
            || {
                each(&whole, |number, weight| {
                    let name = number.map_or_else(|| site.name.clone(), |number| format!("{}.{number}", site.name));
                    match (recipe.init_lora_weights, scheme) {
                        (InitLora::Loftq, Some(scheme)) => lost(weight, scheme, r, target.scale),
                        // Nothing is lost of a weight that stays as it is.
                        (InitLora::Loftq, None) => (
                            init::start(InitLora::Kaiming, seed, &name, (r, columns)),
                            Tensor::zeros([rows, r], (Kind::Float, Device::Cpu)),
                        ),
                        (InitLora::Olora, _) => orthonormal(weight, r),
                        (InitLora::Pissa | InitLora::Kaiming | InitLora::Gaussian, _) => {
                            let fast = recipe.pissa_niter.map(|iterations| {
                                (iterations, init::start(InitLora::Pissa, seed, &name, (r, columns)))
                            });
                            principal(weight, r, target.scale, fast)
                        }
                    }
                })
            },
            |(a, b)| (a.to_device(whole.device()), b.to_device(whole.device())),
        );
        // As read from a file: products of another order round otherwise.
        let (a, b) = (a.contiguous(), b.contiguous());
        if !recipe.takes_off() {
            return Ok((a, b, None));
        }
        self.leave(linear, &left(&whole, (&a, &b), target.scale));
        let taken = (a.copy(), b.copy());
        Ok((a, b, Some(taken)))
    }

    /// Leaves in the linear what is left of its weight.
    pub(super) fn leave(&self, linear: &mut Linear, left: &Tensor) {
        linear.weight = match self.scheme(&linear.name) {
            Some(scheme) => scheme.keep(&left.to_kind(scheme.kind)),
            None => Weight::Dense(left.to_kind(self.kind)),
        };
    }

    /// The weight of a linear before it was quantised, fp32: (out, in) or (E, out, in).
    pub(super) fn whole(&self, site: &Site, linear: &Linear) -> Result<Tensor> {
        // Of a base that is stored so, nothing else is known.
        let again = self.origin.filter(|origin| {
            let asked = origin.scheme.map(|scheme| scheme.form);
            asked.is_some() && origin.checkpoint.quantised_form() != asked
        });
        let weight = match (again, self.quantised.get(&site.name)) {
            (Some(origin), Some(names)) => original(origin.checkpoint, site, names, linear)?,
            _ => linear.weight.dense(),
        };
        Ok(weight.to_kind(Kind::Float))
    }

    fn scheme(&self, module: &str) -> Option<&'a Scheme> {
        self.origin.and_then(|origin| origin.scheme).filter(|_| self.quantised.contains_key(module))
    }
}

/// `W - s B A`, fp32, of weights (out, in) or (E, out, in).
pub(super) fn left(weight: &Tensor, (a, b): (&Tensor, &Tensor), scale: f64) -> Tensor {
    let [a, b] = [a, b].map(|t| t.to_device(weight.device()));
    weight.to_kind(Kind::Float) - b.matmul(&a) * scale
}

/// Reads a weight once more, as its linear has it.
fn original(checkpoint: &Checkpoint, site: &Site, names: &[String], linear: &Linear) -> Result<Tensor> {
    let read = |name: &String| checkpoint.tensor(name, linear.weight.kind(), linear.weight.device());
    let all: Vec<Tensor> = names.iter().map(read).collect::<Result<_>>()?;
    Ok(match (&site.role, &all[..]) {
        (Role::Experts { stored: Stored::Transposed { .. }, .. }, [one]) => one.transpose(1, 2).contiguous(),
        (_, [one]) => one.shallow_clone(),
        _ => Tensor::stack(&all, 0),
    })
}

/// A and B of a weight (out, in), or of all weights (E, out, in).
fn each(weight: &Tensor, start: impl Fn(Option<i64>, &Tensor) -> Pair) -> Pair {
    if weight.dim() == 2 {
        return start(None, weight);
    }
    let all = weight.unbind(0);
    let (a, b): (Vec<_>, Vec<_>) = (0..).zip(&all).map(|(number, weight)| start(Some(number), weight)).unzip();
    (Tensor::stack(&a, 0), Tensor::stack(&b, 0))
}

/// What a module started with, of all that the run's folder has.
fn found(start: &[(String, Tensor)], module: &str) -> Result<Pair> {
    let of = |end: &str| {
        let key = format!("{PREFIX}{module}.{end}");
        let found = start.iter().find(|(name, _)| *name == key).map(|(_, tensor)| tensor.shallow_clone());
        found.ok_or_else(|| {
            let fault = Fault::new(&key, "is not among what this run started with");
            Error::State(fault.hint("begin again with --overwrite"))
        })
    };
    Ok((of("lora_A.weight")?, of("lora_B.weight")?))
}

/// PiSSA: of `W = U S V^T`, `s B A` is the part of the R largest singular values, each half of the root of them.
///
/// `fast` is a number of iterations and a start (R, in) of the randomised decomposition that replaces the exact one.
fn principal(weight: &Tensor, r: i64, scale: f64, fast: Option<(u32, Tensor)>) -> Pair {
    let (u, s, vt) = match fast {
        None => svd(weight),
        Some((iterations, start)) => nearly(weight, iterations, &start),
    };
    halves(&u, &(s / scale), &vt, r)
}

/// OLoRA: B is the first R columns of Q and A the first R rows of R of `W = Q R`.
///
/// A column of Q depends on the columns of W up to its own, so W's first R are enough, and `A = B^T W`.
fn orthonormal(weight: &Tensor, r: i64) -> Pair {
    let (q, _) = Tensor::linalg_qr(&weight.narrow(1, 0, r), "reduced"); // (out, R)
    (q.tr().mm(weight), q)
}

/// LoftQ: the best pair for what quantising W loses, `W - Q(W)`.
///
/// PEFT leaves the scale out, so that its pair makes the loss good only where the scale is 1; here it always does.
fn lost(weight: &Tensor, scheme: &Scheme, r: i64, scale: f64) -> Pair {
    let left = weight - scheme.numbers(weight).to_kind(Kind::Float);
    let (u, s, vt) = svd(&left);
    halves(&u, &(s / scale), &vt, r)
}

/// U (out, K), S (K) and V^T (K, in), the largest values first.
fn svd(weight: &Tensor) -> (Tensor, Tensor, Tensor) {
    let (u, s, v) = weight.svd(true, true);
    (u, s, v.tr())
}

/// `B A = U S V^T` cut to R.
fn halves(u: &Tensor, s: &Tensor, vt: &Tensor, r: i64) -> Pair {
    let root = s.narrow(0, 0, r).sqrt(); // (R)
    (root.unsqueeze(1) * vt.narrow(0, 0, r), u.narrow(1, 0, r) * root)
}

/// U (out, R), S (R) and V^T (R, in) by subspace iteration from `start` (R, in): Halko, Martinsson and Tropp (arXiv:0909.4061),
/// algorithms 4.4 and 5.1, with torch's number of iterations.
fn nearly(weight: &Tensor, iterations: u32, start: &Tensor) -> (Tensor, Tensor, Tensor) {
    let basis = |t: Tensor| Tensor::linalg_qr(&t, "reduced").0;
    let mut q = basis(weight.mm(&start.tr())); // (out, R)
    for _ in 0..iterations {
        q = basis(weight.tr().mm(&q)); // (in, R)
        q = basis(weight.mm(&q)); // (out, R)
    }
    let (u, s, vt) = svd(&q.tr().mm(weight));
    (q.mm(&u), s, vt)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quant::{Form, FourBitType, Products};

    fn weight(rows: i64, columns: i64) -> Tensor {
        tch::manual_seed(4);
        Tensor::randn([rows, columns], (Kind::Float, Device::Cpu))
    }

    fn off(found: &Tensor, expected: &Tensor) -> f64 {
        ((found - expected).abs().max() / expected.abs().max()).double_value(&[])
    }

    /// `tests/python/starts.py`.
    #[test]
    fn loftq_is_pefts_where_the_scale_is_one() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/llama/starts.safetensors");
        let file = Checkpoint::open_file(std::path::Path::new(file)).unwrap();
        let read = |name: &str| file.tensor(name, Kind::Float, Device::Cpu).unwrap();
        let form = Form::FourBit { code: FourBitType::Nf4, block: 64, double_quant: false };
        let products = Products::Dequantised;
        let scheme = Scheme { form, kind: Kind::Float, skip: Vec::new(), products, after_start: false };
        for scale in [1.0, 0.5] {
            let (a, b) = lost(&read("loftq.weight"), &scheme, 4, scale);
            assert!(off(&(b.matmul(&a) * scale), &read("loftq.product")) < 1e-5);
        }
    }

    #[test]
    fn the_fast_decomposition_comes_near_the_exact_one_and_what_is_left_is_small() {
        let (rows, columns, r) = (40, 60, 5);
        // Singular values that fall off.
        let weight = weight(rows, 12)
            .matmul(&(weight(12, columns) * Tensor::arange(12, (Kind::Float, Device::Cpu)).neg().exp().unsqueeze(1)));
        let (a, b) = principal(&weight, r, 2.0, None);
        let start = init::start(InitLora::Pissa, 1, "x", (r, columns));
        let (fast_a, fast_b) = principal(&weight, r, 2.0, Some((8, start)));
        assert!(off(&fast_b.matmul(&fast_a), &b.matmul(&a)) < 1e-4);
        let rest = left(&weight, (&a, &b), 2.0);
        let (_, s, _) = svd(&weight);
        let (_, left, _) = svd(&rest);
        assert!(off(&left.narrow(0, 0, 3), &s.narrow(0, r, 3)) < 1e-3, "the largest values are gone");
    }

    #[test]
    fn the_first_columns_of_qr_need_the_first_columns_of_the_weight() {
        let weight = weight(20, 30);
        let (q, r) = Tensor::linalg_qr(&weight, "reduced");
        let (a, b) = orthonormal(&weight, 6);
        assert!(off(&b, &q.narrow(1, 0, 6)) < 1e-5 && off(&a, &r.narrow(0, 0, 6)) < 1e-5);
    }
}
