//! Starts that are taken from the weight itself: PiSSA (arXiv:2404.02948), OLoRA (arXiv:2406.01775) and LoftQ (arXiv:2310.08659), as
//! PEFT 0.21.2 makes them.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};

use tch::{Device, Kind, Tensor};

use super::Update;
use super::init;
use super::load::PREFIX;
use super::targets::Target;
use crate::model::sites::{Role, Site};
use crate::model::spec::Stored;
use crate::model::{Decoder, Linear};
use crate::quant::{Digest, Form, Scheme, Weight};
use crate::recipe::{AdapterRecipe, InitLora};
use crate::weights::Checkpoint;
use crate::{Error, Fault, Result};

/// A (R, in) and B (out, R), fp32.
type Pair = (Tensor, Tensor);

/// What a module starts with, and what is taken off its weight.
type Begun = (Pair, Pair);

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
    /// Fingerprints of what was left of weights and quantised, by module.
    digests: RefCell<BTreeMap<String, Digest>>,
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
        Self { origin, quantised, digests: RefCell::default(), kind: model.kind }
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
        if let Some(scheme) = scheme
            && (recipe.takes_off() || makes_up)
        {
            self.prove_possible(scheme.form, makes_up)?;
        }
        let whole = self.whole(site, linear)?;
        let begun = match self.origin.and_then(|origin| origin.start.as_ref()) {
            Some(start) => {
                let own = found(start, &site.name, OWN)?;
                let taken =
                    if makes_up && recipe.takes_off() { found(start, &site.name, TAKEN)? } else { handles(&own) };
                (own, taken)
            }
            None => each(&whole, |number, weight| {
                let name = number.map_or_else(|| site.name.clone(), |number| format!("{}.{number}", site.name));
                match (recipe.init_lora_weights, scheme) {
                    (InitLora::Loftq, Some(scheme)) => lost(weight, scheme, r, target.scale, recipe.loftq_iter),
                    // Nothing is lost of a weight that stays as it is.
                    (InitLora::Loftq, None) => all_taken((
                        init::start(InitLora::Kaiming, seed, &name, (r, columns)),
                        Tensor::zeros([rows, r], (Kind::Float, Device::Cpu)),
                    )),
                    (InitLora::Olora, _) => all_taken(orthonormal(weight, r)),
                    (InitLora::Pissa | InitLora::Kaiming | InitLora::Gaussian, _) => {
                        let fast = recipe
                            .pissa_niter
                            .map(|iterations| (iterations, init::start(InitLora::Pissa, seed, &name, (r, columns))));
                        all_taken(principal(weight, r, target.scale, fast))
                    }
                }
            }),
        };
        // As read from a file: products of another order round otherwise.
        let settled =
            |(a, b): Pair| (a.to_device(whole.device()).contiguous(), b.to_device(whole.device()).contiguous());
        let ((a, b), taken) = (settled(begun.0), settled(begun.1));
        if !recipe.takes_off() {
            return Ok((a, b, None));
        }
        self.leave(linear, &left(&whole, (&taken.0, &taken.1), target.scale));
        Ok((a, b, Some(taken)))
    }

    /// An error where a start cannot be had of a base in this form: one that makes up for what quantising lost, or takes something off.
    fn prove_possible(&self, form: Form, makes_up: bool) -> Result<()> {
        let stored = self.origin.and_then(|origin| origin.checkpoint.quantised_form());
        let (what, hint) = if makes_up && (stored == Some(form) || !form.can_be_made()) {
            let what =
                format!("makes up for what the base lost, which is stored as {form}: what it was before is not known");
            (what, "choose another start, or name the model the base was made of: it is quantised here")
        } else if !form.can_be_made() {
            let what = format!(
                "takes a part off each weight, and the rest would have to be stored as {form} again, which only its own tool does"
            );
            let further = "choose another start; or write adapter.method: lora, which reads the base as plain numbers; or quantise \
                           it further here (quantization.type)";
            let other = "choose another start; or write adapter.method: lora, which reads the base as plain numbers; or name the \
                         model the base was made of, which is quantised here";
            (what, if form.may_become(Form::Int8) { further } else { other })
        } else {
            return Ok(());
        };
        Err(Error::Recipe(vec![Fault::new("adapter.init_lora_weights", what).hint(hint)]))
    }

    /// Leaves in the linear what is left of its weight.
    pub(super) fn leave(&self, linear: &mut Linear, left: &Tensor) {
        linear.weight = match self.scheme(&linear.name) {
            Some(scheme) => {
                let (weight, digest) = scheme.keep(left, self.kind);
                self.digests.borrow_mut().insert(linear.name.clone(), digest);
                weight
            }
            None => Weight::Dense(left.to_kind(self.kind)),
        };
    }

    /// Fingerprints of what was left of weights and quantised, by module.
    pub(super) fn digests(self) -> BTreeMap<String, Digest> {
        self.digests.into_inner()
    }

    /// The weight of a linear before it was quantised, fp32: (out, in) or (E, out, in).
    pub(super) fn whole(&self, site: &Site, linear: &Linear) -> Result<Tensor> {
        // Of a base that is stored so, nothing else is known.
        let again = self.origin.and_then(|origin| {
            let scheme = origin.scheme.filter(|scheme| origin.checkpoint.quantised_form() != Some(scheme.form))?;
            Some((origin.checkpoint, scheme.kind))
        });
        let weight = match (again, self.quantised.get(&site.name)) {
            (Some((checkpoint, kind)), Some(names)) => original(checkpoint, site, names, kind, linear.weight.device())?,
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

/// Reads a weight once more, in the number type that it was quantised of, as its linear has it.
fn original(checkpoint: &Checkpoint, site: &Site, names: &[String], kind: Kind, device: Device) -> Result<Tensor> {
    let read = |name: &String| checkpoint.tensor(name, kind, device);
    let all: Vec<Tensor> = names.iter().map(read).collect::<Result<_>>()?;
    Ok(match (&site.role, &all[..]) {
        (Role::Experts { stored: Stored::Transposed { .. }, .. }, [one]) => one.transpose(1, 2).contiguous(),
        (_, [one]) => one.shallow_clone(),
        _ => Tensor::stack(&all, 0),
    })
}

/// What a weight (out, in), or all weights (E, out, in), start with.
fn each(weight: &Tensor, start: impl Fn(Option<i64>, &Tensor) -> Begun) -> Begun {
    if weight.dim() == 2 {
        return start(None, weight);
    }
    let all = weight.unbind(0);
    let begun: Vec<Begun> = (0..).zip(&all).map(|(number, weight)| start(Some(number), weight)).collect();
    let stacked = |of: fn(&Begun) -> &Tensor| Tensor::stack(&begun.iter().map(of).collect::<Vec<_>>(), 0);
    ((stacked(|b| &b.0.0), stacked(|b| &b.0.1)), (stacked(|b| &b.1.0), stacked(|b| &b.1.1)))
}

/// Another handle to the same tensors.
fn handles((a, b): &Pair) -> Pair {
    (a.shallow_clone(), b.shallow_clone())
}

/// A pair that is taken off the weight it starts on.
fn all_taken(pair: Pair) -> Begun {
    let taken = handles(&pair);
    (pair, taken)
}

/// How the keys end of what a module starts with, and of what was taken off its weight where that is another pair.
const OWN: [&str; 2] = ["lora_A.weight", "lora_B.weight"];
const TAKEN: [&str; 2] = ["taken_A.weight", "taken_B.weight"];

/// What was taken off the weights, under the names that [`Origin::start`] has for it, where it is not what their modules start with.
pub(super) fn taken_otherwise<'a>(
    recipe: &AdapterRecipe,
    updates: &'a [Update],
) -> impl Iterator<Item = (String, Tensor)> + use<'a> {
    let otherwise = recipe.takes_off() && recipe.init_lora_weights == InitLora::Loftq;
    let of = |update: &'a Update| Some((&update.module, update.taken.as_ref()?));
    updates.iter().filter(move |_| otherwise).filter_map(of).flat_map(|(module, (a, b))| {
        [(TAKEN[0], a), (TAKEN[1], b)].map(|(end, tensor)| (format!("{PREFIX}{module}.{end}"), tensor.copy()))
    })
}

/// What a module started with, of all that the run's folder has, under keys with these ends.
fn found(start: &[(String, Tensor)], module: &str, ends: [&str; 2]) -> Result<Pair> {
    let of = |end: &str| {
        let key = format!("{PREFIX}{module}.{end}");
        let found = start.iter().find(|(name, _)| *name == key).map(|(_, tensor)| tensor.shallow_clone());
        found.ok_or_else(|| {
            let fault = Fault::new(&key, "is not among what this run started with");
            Error::State(fault.hint("begin again with --overwrite"))
        })
    };
    Ok((of(ends[0])?, of(ends[1])?))
}

/// PiSSA: of `W = U S V^T`, `s B A` is the part of the R largest singular values, each half of the root of them.
///
/// `fast` is a number of iterations and a start (R, in) of the randomised decomposition that replaces the exact one.
fn principal(weight: &Tensor, r: i64, scale: f64, fast: Option<(u32, Tensor)>) -> Pair {
    let (u, s, vt) = match fast {
        None => largest(weight, r),
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

/// LoftQ: the best pair for what quantising W loses, `W - Q(W)`; in every further iteration that for `W - Q(W - s B A)`, of the pair
/// before, which is then what is taken off.
///
/// PEFT leaves the scale out, so that its pair makes the loss good only where the scale is 1; here it always does.
fn lost(weight: &Tensor, scheme: &Scheme, r: i64, scale: f64, iterations: u32) -> Begun {
    let best = |quantised: &Tensor| {
        let (u, s, vt) = largest(&(weight - scheme.numbers(quantised).to_kind(Kind::Float)), r);
        halves(&u, &(s / scale), &vt, r)
    };
    let zeros = |like: &Tensor| like.zeros_like();
    let first = best(weight);
    let taken = (zeros(&first.0), zeros(&first.1));
    (1..iterations).fold((first, taken), |(taken, _), _| (best(&left(weight, (&taken.0, &taken.1), scale)), taken))
}

/// How large the last value that is asked for must be beside the first, for both to be had of their squares in fp32.
const LEAST: f64 = 0.03;

/// U (out, R), S (R) and V^T (R, in) of the R largest singular values, the largest first.
///
/// By the eigenvectors of `W W^T`, or of `W^T W` where that is smaller: a half to a fifth of the time of the singular value
/// decomposition, and nearer to that in fp64 than it is in fp32. Squares have half the digits, so where values fall off steeply the
/// weight itself is decomposed.
fn largest(weight: &Tensor, r: i64) -> (Tensor, Tensor, Tensor) {
    let tall = weight.size()[0] > weight.size()[1];
    let flat = if tall { weight.tr() } else { weight.shallow_clone() }; // (K, longer)
    let (_, vectors) = flat.mm(&flat.tr()).linalg_eigh("L");
    let short = vectors.narrow(1, vectors.size()[1] - r, r).flip([1]); // (K, R)
    let long = short.tr().mm(&flat); // (R, longer)
    let s = long.norm_scalaropt_dim(2.0, [1i64].as_slice(), false); // (R)
    let (first, last) = (s.double_value(&[0]), s.double_value(&[r - 1]));
    if last.is_nan() || last <= LEAST * first {
        return svd(weight);
    }
    let long = long / s.unsqueeze(1);
    if tall { (long.tr(), s, short.tr()) } else { (short, s, long) }
}

/// U (out, K), S (K) and V^T (K, in), the largest values first.
fn svd(weight: &Tensor) -> (Tensor, Tensor, Tensor) {
    let (u, s, v) = weight.svd(true, true);
    (u, s, v.tr())
}

/// `B A = U S V^T` cut to R.
fn halves(u: &Tensor, s: &Tensor, vt: &Tensor, r: i64) -> Pair {
    let root = s.narrow(0, 0, r).sqrt(); // (R)
    ((root.unsqueeze(1) * vt.narrow(0, 0, r)).contiguous(), (u.narrow(1, 0, r) * root).contiguous())
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
    use crate::quant::{FourBitType, Products};

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
            for (iterations, name) in [(1, "loftq"), (5, "loftq.5")] {
                let weight = read("loftq.weight");
                let ((a, b), taken) = lost(&weight, &scheme, 4, scale, iterations);
                assert!(off(&(b.matmul(&a) * scale), &read(&format!("{name}.product"))) < 1e-4, "{name} {scale}");
                // What is left is quantised; a number at a bound between two codes may fall to either side.
                let base = scheme.numbers(&left(&weight, (&taken.0, &taken.1), scale));
                let differ = (base - read(&format!("{name}.base"))).abs().gt(1e-6).sum(Kind::Int64).int64_value(&[]);
                assert!(differ <= 2, "{name} {scale}: {differ} numbers of the base differ");
            }
        }
    }

    #[test]
    fn the_largest_singular_values_and_vectors_are_those_of_the_whole_decomposition_in_fp64() {
        let r = 6;
        let falling = |size: i64, base: f64| {
            let exponents = Tensor::arange(size, (Kind::Float, Device::Cpu)) * base.ln();
            weight(60, size).matmul(&(exponents.exp().unsqueeze(1) * weight(size, 90)))
        };
        // Of even values, of some that fall off, of such that their squares are lost in fp32, of fewer than are asked for, of none.
        let nothing = Tensor::zeros([60, 90], (Kind::Float, Device::Cpu));
        for (weight, what) in [
            (weight(60, 90), "even"),
            (falling(40, 0.7), "falling"),
            (falling(40, 0.02), "steep"),
            (falling(3, 0.5), "few"),
            (nothing, "none"),
        ] {
            for weight in [weight.tr().contiguous(), weight] {
                let ((u, s, vt), (exact_u, exact_s, exact_vt)) =
                    (largest(&weight, r), svd(&weight.to_kind(Kind::Double)));
                assert!(s.isfinite().all().int64_value(&[]) == 1, "{what}");
                let cut = |u: &Tensor, s: &Tensor, vt: &Tensor| {
                    (u.narrow(1, 0, r) * s.narrow(0, 0, r)).matmul(&vt.narrow(0, 0, r)).to_kind(Kind::Double)
                };
                let exact = cut(&exact_u, &exact_s, &exact_vt);
                let off = (cut(&u, &s, &vt) - &exact).norm().double_value(&[]);
                assert!(off <= 1e-5 * exact.norm().double_value(&[]), "{what}: off by {off:e}");
                let values = (s.narrow(0, 0, r) - exact_s.narrow(0, 0, r)).abs().max().double_value(&[]);
                assert!(values <= 1e-5 * exact_s.double_value(&[0]), "{what}: {values:e}");
            }
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
