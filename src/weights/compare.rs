//! Two sets of tensors beside each other, name by name: what is missing, what is of another shape or number type, and how far the
//! numbers are apart.

use std::collections::BTreeSet;

use rayon::prelude::*;
use serde::Serialize;
use tch::Kind;

use super::{Checkpoint, Pieces, storage};
use crate::{Error, Result};

/// Bytes that are compared at a time.
const AT_ONCE: u64 = 1 << 20;

/// Two sets of tensors beside each other.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Comparison {
    /// How many tensors are in both.
    pub in_both: usize,
    /// How many of these are equal: of the same shape and number type, and no further apart than is tolerated.
    pub equal: usize,
    /// Those that are not, in the order of their names.
    pub different: Vec<Difference>,
    /// Names that only the first has.
    pub only_in_first: Vec<String>,
    /// Names that only the second has.
    pub only_in_second: Vec<String>,
}

/// A tensor that is another in the second set.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// Its name.
    pub name: String,
    /// Its shapes.
    pub shapes: [Vec<i64>; 2],
    /// How it is stored, as the formats name it.
    pub stored: [String; 2],
    /// The largest difference of two numbers; absent where shapes differ.
    pub largest: Option<f64>,
    /// The length of the difference over that of the first; absent where shapes differ.
    pub relative: Option<f64>,
}

impl Comparison {
    /// Compares every tensor of two sets, in f64, a piece of both at a time; what is stored quantised (but for GGUF's blocks) is made whole
    /// as fp32. Tensors whose relative difference is at most `tolerance` count as equal, and then the number type may be another; with a
    /// tolerance of 0 nothing may differ. `progress` is called with tensors done and in all.
    ///
    /// Errors: what a checkpoint finds damaged, numbers that are not finite among it.
    pub fn of(first: &Checkpoint, second: &Checkpoint, tolerance: f64, progress: &dyn Fn(u64, u64)) -> Result<Self> {
        let names = |of: &Checkpoint| of.names().into_iter().map(String::from).collect::<BTreeSet<_>>();
        let [ours, theirs] = [first, second].map(names);
        let mut comparison = Self {
            only_in_first: ours.difference(&theirs).cloned().collect(),
            only_in_second: theirs.difference(&ours).cloned().collect(),
            ..Self::default()
        };
        let both: Vec<&String> = ours.intersection(&theirs).collect();
        comparison.in_both = both.len();
        for (number, name) in both.iter().enumerate() {
            match difference(first, second, name, tolerance)? {
                None => comparison.equal += 1,
                Some(difference) => comparison.different.push(difference),
            }
            progress(number as u64 + 1, both.len() as u64);
        }
        Ok(comparison)
    }

    /// Whether nothing differs.
    pub fn is_equal(&self) -> bool {
        self.different.is_empty() && self.only_in_first.is_empty() && self.only_in_second.is_empty()
    }
}

fn difference(first: &Checkpoint, second: &Checkpoint, name: &str, tolerance: f64) -> Result<Option<Difference>> {
    let of_both = [first, second];
    let shapes = of_both.map(|of| of.shape(name).unwrap_or_default());
    let stored = of_both.map(|of| of.stored_as(name).unwrap_or_default().to_string());
    let mut found = Difference { name: name.into(), shapes, stored, largest: None, relative: None };
    if found.shapes[0] != found.shapes[1] {
        return Ok(Some(found));
    }
    let alike = found.stored[0] == found.stored[1];
    let [one, other] = of_both.map(|of| of.pieces(name));
    let (one, other) = (one?, other?);
    if alike && same_bytes(&one, &other)? {
        return Ok(None);
    }
    let (mut whole, mut missed, mut largest) = (0.0, 0.0, 0.0f64);
    for place in one.places() {
        let [one, other] = [&one, &other].map(|of| of.piece(place, Kind::Double));
        let one = one?;
        let apart = &one - other?;
        whole += one.square().sum(Kind::Double).double_value(&[]);
        missed += apart.square().sum(Kind::Double).double_value(&[]);
        largest = largest.max(apart.abs().max().double_value(&[]));
    }
    let relative = match (missed, whole) {
        (0.0, _) => 0.0,
        // Of zeros, everything is infinitely far.
        (_, 0.0) => f64::INFINITY,
        (missed, whole) => (missed / whole).sqrt(),
    };
    if relative <= tolerance && (alike || tolerance > 0.0) {
        return Ok(None);
    }
    found.largest = Some(largest);
    // JSON has no infinity.
    found.relative = Some(relative).filter(|relative| relative.is_finite());
    Ok(Some(found))
}

/// Whether two tensors of one shape are stored as the same plain numbers, byte by byte, and these are finite.
fn same_bytes(one: &Pieces<'_>, other: &Pieces<'_>) -> Result<bool> {
    let (Some((one_at, dtype)), Some((other_at, other_dtype))) = (one.plain(), other.plain()) else { return Ok(false) };
    let (Some(kind), true) = (dtype.kind, dtype == other_dtype) else { return Ok(false) };
    let length = one.count as u64 * dtype.bits / 8;
    let compared = (0..length.div_ceil(AT_ONCE)).into_par_iter().try_for_each_init(
        || [Vec::new(), Vec::new()],
        |[mine, theirs], number| {
            let start = number * AT_ONCE;
            for (bytes, source) in [(&mut *mine, one_at), (&mut *theirs, other_at)] {
                bytes.resize((length - start).min(AT_ONCE) as usize, 0);
                source.read(bytes, start).map_err(Some)?;
            }
            one_at.finite(storage::non_finite(kind, mine), kind).map_err(Some)?;
            if mine == theirs { Ok(()) } else { Err(None::<Error>) }
        },
    );
    match compared {
        Ok(()) => Ok(true),
        Err(None) => Ok(false),
        Err(Some(error)) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use tch::{Device, Tensor};

    use super::*;

    fn file(folder: &Path, name: &str, tensors: &[(&str, Tensor)]) -> Checkpoint {
        let path = folder.join(name);
        Tensor::write_safetensors(tensors, &path).unwrap();
        Checkpoint::open_file(&path).unwrap()
    }

    #[test]
    fn what_differs_is_named_with_how_far() {
        let folder = tempfile::tempdir().unwrap();
        let numbers = Tensor::from_slice(&[3.0f32, 4.0]);
        let whole = Tensor::from_slice(&[1i64, 1 << 40]);
        let one = file(
            folder.path(),
            "one",
            &[
                ("same", numbers.copy()),
                ("moved", numbers.copy()),
                ("narrow", numbers.copy()),
                ("shape", numbers.copy()),
                ("ids", whole.copy()),
                ("only", numbers.copy()),
            ],
        );
        let other = file(
            folder.path(),
            "other",
            &[
                ("same", numbers.copy()),
                ("moved", &numbers + Tensor::from_slice(&[0.0f32, 0.5])),
                ("narrow", numbers.to_kind(Kind::BFloat16)),
                ("shape", numbers.view([2, 1])),
                ("ids", &whole + 1),
                ("more", numbers.copy()),
            ],
        );
        let strict = Comparison::of(&one, &other, 0.0, &|_, _| ()).unwrap();
        assert_eq!((strict.in_both, strict.equal), (5, 1));
        let names: Vec<&str> = strict.different.iter().map(|difference| difference.name.as_str()).collect();
        assert_eq!(names, ["ids", "moved", "narrow", "shape"]);
        let of = |name: &str| strict.different.iter().find(|difference| difference.name == name).unwrap();
        assert_eq!((of("moved").largest, of("moved").relative), (Some(0.5), Some(0.1)));
        assert_eq!((of("narrow").largest, &of("narrow").stored[1][..]), (Some(0.0), "BF16"));
        assert_eq!((of("shape").largest, &of("shape").shapes), (None, &[vec![2], vec![2, 1]]));
        assert_eq!(of("ids").largest, Some(1.0), "not rounded to fp32");
        assert_eq!((strict.only_in_first, strict.only_in_second), (vec!["only".into()], vec!["more".into()]));

        let lenient = Comparison::of(&one, &other, 0.2, &|_, _| ()).unwrap();
        let names: Vec<&str> = lenient.different.iter().map(|difference| difference.name.as_str()).collect();
        assert_eq!(names, ["shape"]);
        assert!(!lenient.is_equal() && Comparison::of(&one, &one, 0.0, &|_, _| ()).unwrap().is_equal());
    }

    /// Tensors of several pieces: what differs in the last of them, and damage that both have.
    #[test]
    fn large_tensors_are_compared_to_their_end() {
        let folder = tempfile::tempdir().unwrap();
        let count = 2 * Pieces::LENGTH + 7;
        let numbers = || Tensor::ones([count], (Kind::Float, Device::Cpu));
        let changed = |at: i64, number: f64| {
            let all = numbers();
            let _ = all.get(at).fill_(number);
            all
        };
        let one = file(folder.path(), "one", &[("w", numbers()), ("zero", changed(3, 0.0))]);
        let other = file(folder.path(), "other", &[("w", changed(count - 1, 3.0)), ("zero", changed(3, -0.0))]);
        assert!(Comparison::of(&one, &one, 0.0, &|_, _| ()).unwrap().is_equal());
        let found = Comparison::of(&one, &other, 0.0, &|_, _| ()).unwrap();
        assert_eq!((found.equal, found.different.len()), (1, 1), "{found:?}");
        let expected = 2.0 / (count as f64).sqrt();
        assert_eq!(found.different[0].largest, Some(2.0));
        assert!((found.different[0].relative.unwrap() - expected).abs() < 1e-12, "{found:?}");
        let damaged = file(folder.path(), "damaged", &[("w", changed(count - 2, f64::INFINITY))]);
        for second in [&damaged, &one] {
            let error = Comparison::of(&damaged, second, 0.0, &|_, _| ()).unwrap_err().to_string();
            assert!(error.contains("1 value is NaN or infinite"), "{error}");
        }
    }
}
