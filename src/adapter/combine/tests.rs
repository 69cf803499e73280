//! Against PEFT's own sums in `tests/fixtures/peft/combined.safetensors` (made by `tests/python/combined.py`).

use std::path::{Path, PathBuf};

use tch::{Device, Kind};

use super::*;
use crate::weights::Checkpoint;

const WEIGHTS: [f64; 3] = [0.7, -0.3, 0.5];
const QUIET: &dyn Fn(u64, u64) = &|_, _| ();

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/peft")
}

fn read(names: &[&str]) -> Vec<LoadedAdapter> {
    names.iter().map(|name| LoadedAdapter::read(&fixtures().join(name)).unwrap()).collect()
}

fn asked(method: Method) -> Combination {
    let density = method.prunes().then_some(0.6);
    Combination { method, weights: WEIGHTS.to_vec(), density, majority: MajoritySign::Total, rank: None, seed: 1 }
}

/// The mask that the fixture was made with.
fn fixed(like: &Tensor, _: &str, _: f64) -> Tensor {
    let places = Tensor::arange(like.numel() as i64, (Kind::Int64, Device::Cpu));
    ((places * 3).remainder(5).lt(3)).to_kind(Kind::Float).view(&like.size()[..])
}

fn off(ours: &Tensor, theirs: &Tensor) -> f64 {
    assert_eq!(ours.size(), theirs.size());
    let largest = theirs.abs().max().double_value(&[]);
    (ours - theirs).abs().max().double_value(&[]) / largest.max(1e-12)
}

#[test]
fn every_kind_of_sum_is_pefts() {
    let fixture = Checkpoint::open_file(&fixtures().join("combined.safetensors")).unwrap();
    let theirs = |name: String| fixture.tensor(&name, Kind::Float, Device::Cpu).unwrap();
    let adapters = read(&["all-linear", "names", "layers"]);
    use Method::*;
    let mut cases: Vec<(String, Combination)> = [
        Linear,
        Cat,
        Svd,
        Ties,
        TiesSvd,
        DareLinear,
        DareTies,
        DareLinearSvd,
        DareTiesSvd,
        MagnitudePrune,
        MagnitudePruneSvd,
    ]
    .map(|method| (method.name().to_string(), asked(method)))
    .to_vec();
    cases.push(("ties_frequency".into(), Combination { majority: MajoritySign::Frequency, ..asked(Ties) }));
    cases.push(("svd_rank_3".into(), Combination { rank: Some(3), ..asked(Svd) }));
    cases.push(("dare_linear_all".into(), Combination { density: Some(1.0), ..asked(DareLinear) }));
    let mut compared = 0;
    for (name, how) in cases {
        let Combined { config, updates, relative_error } = combined(&adapters, &how, &fixed, QUIET).unwrap();
        assert_eq!(updates.len(), 21, "{name}");
        assert_eq!(config.lora_alpha, f64::from(config.r), "{name}");
        for update in &updates {
            let module = &update.module;
            let of = |part: &str| theirs(format!("{name}.{module}.{part}"));
            assert_eq!(update.rank(), i64::from(config.r), "{name}: {module}");
            if how.method.splits() {
                // Which of a pair of singular vectors is turned round is a matter of chance.
                let worst = off(&update.b.mm(&update.a), &of("product"));
                assert!(worst < 1e-5, "{name}: {module}: {worst}");
                assert!(relative_error.is_some_and(|error| (0.0..1.0).contains(&error)), "{name}");
            } else {
                for (ours, part) in [(&update.a, "lora_A"), (&update.b, "lora_B")] {
                    let worst = off(ours, &of(part));
                    assert!(worst < 1e-6, "{name}: {module}.{part}: {worst}");
                }
            }
            compared += 1;
        }
    }
    assert_eq!(compared, 14 * 21);
}

#[test]
fn what_is_kept_at_random_is_the_share_asked_for_and_a_function_of_the_seed() {
    let adapters = read(&["all-linear", "names", "layers"]);
    let with = |seed: u64| {
        let how = Combination { seed, density: Some(0.5), ..asked(Method::DareLinear) };
        combine(&adapters, &how, QUIET).unwrap().updates
    };
    let same =
        |one: &[Update], other: &[Update]| one.iter().zip(other).all(|(a, b)| a.a.equal(&b.a) && a.b.equal(&b.b));
    assert!(same(&with(1), &with(1)) && !same(&with(1), &with(2)));
    // In law: of many masks, the mean is the share that is kept, and the mean sum is the plain one.
    let large = Tensor::ones([400, 500], (Kind::Float, Device::Cpu));
    let kept = keep_mask(&large, 0.3, mask_seed(1, "0.q_proj.lora_A")).to_kind(Kind::Float);
    let share = kept.mean(Kind::Float).double_value(&[]);
    assert!((share - 0.3).abs() < 0.005, "{share}");
    let keep = |_: usize, like: &Tensor| keep_mask(like, 0.3, 5);
    let sum = arithmetic::sum(&[large], &[2.0], (Pruning::Random, Sum::All), 0.3, &keep);
    let mean = sum.mean(Kind::Float).double_value(&[]);
    assert!((mean - 2.0).abs() < 0.03, "{mean}");
    assert!(sum.max().double_value(&[]) > 6.0, "what is kept is made larger");
}

#[test]
fn one_alone_comes_out_as_it_was_and_a_sum_is_read_again() {
    let adapters = read(&["patterns"]);
    let how = Combination { weights: vec![1.0], density: None, ..asked(Method::Svd) };
    let Combined { config, updates, relative_error } = combine(&adapters, &how, QUIET).unwrap();
    assert_eq!(relative_error, None, "nothing is split");
    assert_eq!((config.r, config.use_rslora), (3, false));
    for (before, after) in adapters[0].updates.iter().zip(&updates) {
        let product = |update: &Update| update.b.mm(&update.a) * update.scale;
        assert!(off(&product(after), &product(before)) < 1e-6, "{}", before.module);
    }
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("sum");
    crate::export::peft::write(&place, &config, updates.as_slice().into(), None, &BTreeMap::new()).unwrap();
    let read = LoadedAdapter::read(&place).unwrap();
    assert!(read.updates.iter().zip(&updates).all(|(read, ours)| read.module == ours.module && read.scale == 1.0));
}

#[test]
fn what_has_no_sum_is_refused_with_the_way_out() {
    let three = read(&["all-linear", "names", "layers"]);
    let refused = |adapters: &[LoadedAdapter], how: Combination| combine(adapters, &how, QUIET).unwrap_err();
    for (how, part) in [
        (Combination { weights: vec![1.0], ..asked(Method::Linear) }, "1 weights for 3 adapters"),
        (Combination { weights: vec![1.0, f64::NAN, 1.0], ..asked(Method::Linear) }, "NaN"),
        (Combination { density: None, ..asked(Method::Ties) }, "ties drops numbers"),
        (Combination { density: Some(0.0), ..asked(Method::DareLinear) }, "above 0"),
        (Combination { density: Some(0.5), ..asked(Method::Linear) }, "linear drops nothing"),
        (Combination { rank: Some(4), ..asked(Method::Cat) }, "the rank of cat"),
    ] {
        let error = refused(&three, how);
        assert!(error.exit_code() == 3 && error.to_string().contains(part), "{error}");
    }
    let mixed = read(&["all-linear", "regex"]);
    let two = |method| Combination { weights: vec![1.0, 1.0], density: None, ..asked(method) };
    let error = refused(&mixed, two(Method::Linear)).to_string();
    assert!(error.contains("has rank 1") && error.contains("svd"), "{error}");
    assert!(combine(&mixed, &two(Method::Cat), QUIET).is_ok() && combine(&mixed, &two(Method::Svd), QUIET).is_ok());
    // One of another base.
    let mut other = read(&["names", "names"]);
    other[1].updates[0].b = Tensor::zeros([10, 2], (Kind::Float, Device::Cpu));
    let error = refused(&other, two(Method::Linear)).to_string();
    assert!(error.contains("adapters for two bases"), "{error}");
    let mut dora = read(&["names", "names"]);
    dora[1].config.use_dora = true;
    assert!(refused(&dora, two(Method::Linear)).to_string().contains("DoRA"));
}

/// What a sum of a lower rank misses is measured without the sum being made: it must be what it is.
#[test]
fn what_splitting_misses_is_reported_and_how_far_it_is_too() {
    let adapters = read(&["all-linear", "names"]);
    let how = |method, rank| Combination { weights: vec![1.0, 0.5], rank, density: None, ..asked(method) };
    let exact = combine(&adapters, &how(Method::Cat, None), QUIET).unwrap();
    let told = std::cell::RefCell::new(Vec::new());
    let progress = |done, total| told.borrow_mut().push((done, total));
    let found = combine(&adapters, &how(Method::Svd, Some(1)), &progress).unwrap();
    assert_eq!(told.borrow().len(), 21);
    assert_eq!((told.borrow()[0], told.borrow()[20]), ((1, 21), (21, 21)));
    let product = |update: &Update| update.b.mm(&update.a) * update.scale;
    let squares = |tensor: Tensor| tensor.square().sum(Kind::Double).double_value(&[]);
    let (mut all, mut missed) = (0.0, 0.0);
    for (split, whole) in found.updates.iter().zip(&exact.updates) {
        assert_eq!((split.rank(), &split.module), (1, &whole.module));
        all += squares(product(whole));
        missed += squares(product(whole) - product(split));
    }
    let expected = (missed / all).sqrt();
    assert!(expected > 0.01 && (found.relative_error.unwrap() - expected).abs() < 1e-5, "{found:?}");
}

/// The sum goes with the numbers that all its adapters were trained on.
#[test]
fn a_sum_says_which_base_it_is_for_where_its_adapters_say_the_same() {
    use crate::adapter::TrainedOn;
    use crate::adapter::load::SCHEME;
    use crate::quant::{Digest, Form, FourBitType, Layout, Products, Scheme};

    let root = tempfile::tempdir().unwrap();
    let nf4 = Form::FourBit { code: FourBitType::Nf4, block: 64, double_quant: true };
    let of = |form, digests: &[(&str, i64)]| TrainedOn {
        scheme: Scheme {
            form,
            kind: Kind::BFloat16,
            skip: vec!["lm_head".into()],
            products: Products::Dequantised,
            after_start: false,
        },
        stored: None,
        weights: digests
            .iter()
            .map(|(module, number)| ((*module).to_string(), Digest::default().of_expert(*number)))
            .collect(),
    };
    let all = |on: &[Option<TrainedOn>]| -> Result<(Option<TrainedOn>, Option<String>)> {
        let adapters: Vec<LoadedAdapter> = on
            .iter()
            .enumerate()
            .map(|(number, on)| {
                let folder = root.path().join(number.to_string());
                let _ = std::fs::remove_dir_all(&folder);
                std::fs::create_dir(&folder).unwrap();
                if let Some(on) = on {
                    std::fs::write(folder.join(SCHEME), on.to_json()).unwrap();
                }
                let mut adapter = LoadedAdapter::read(&fixtures().join("names")).unwrap();
                adapter.folder = folder;
                adapter
            })
            .collect();
        trained_on(&adapters)
    };
    assert_eq!(all(&[None, None]).unwrap(), (None, None));
    // One says nothing of k_proj, being of an earlier version or for other modules.
    let found = all(&[Some(of(nf4, &[("q", 1)])), Some(of(nf4, &[("q", 1), ("k", 2)])), Some(of(nf4, &[]))]).unwrap();
    assert_eq!(found, (Some(of(nf4, &[("q", 1), ("k", 2)])), None));
    for (one, other, part) in [
        (Some(of(nf4, &[])), None, "0 on its base quantised as nf4"),
        (None, Some(of(nf4, &[])), "1 on its base quantised as nf4"),
        (Some(of(nf4, &[])), Some(of(Form::Int8, &[])), "1 on its base quantised as int8"),
        (Some(of(nf4, &[("q", 1)])), Some(of(nf4, &[("q", 2)])), "another q than"),
    ] {
        let (on, notice) = all(&[one, other]).unwrap();
        let notice = notice.unwrap();
        assert!(on.is_none() && notice.contains(part) && notice.contains("the base as it is"), "{notice}");
    }
    let stored = Form::Stored(Layout::Gptq);
    let error = all(&[Some(of(stored, &[("q", 1)])), Some(of(stored, &[("q", 2)]))]).unwrap_err().to_string();
    assert!(error.contains("another q than") && error.contains("combine adapters of the same base"), "{error}");
    let mut after = of(nf4, &[]);
    after.scheme.after_start = true;
    assert!(all(&[None, Some(after)]).unwrap_err().to_string().contains("what was left of a base"));
}
