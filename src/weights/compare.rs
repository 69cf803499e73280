//! Two sets of tensors beside each other, name by name: what is missing, what is of another shape or number type, and how far the
//! numbers are apart.

use std::collections::BTreeSet;

use serde::Serialize;
use tch::{Device, Kind, Tensor};

use super::Checkpoint;
use crate::Result;

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
    /// Compares every tensor of two sets. Numbers are read as fp32 (f64 where both are stored so, whole numbers as they are), what is
    /// stored quantised made whole. Tensors whose relative difference is at most `tolerance` count as equal, and then the number type
    /// may be another; with a tolerance of 0 nothing may differ. `progress` is called with tensors done and in all.
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
    let double = found.stored.iter().all(|stored| stored == "F64");
    let read = |of: &Checkpoint| -> Result<Tensor> {
        let kind = of.whole_kind(name).unwrap_or(if double { Kind::Double } else { Kind::Float });
        let wide = if double { Kind::Double } else { Kind::Float };
        Ok(match of.whole_kind(name) {
            // A difference of whole numbers is none of fp32.
            Some(_) => of.tensor(name, kind, Device::Cpu)?.to_kind(Kind::Double),
            None => of.tensor(name, kind, Device::Cpu)?.to_kind(wide),
        })
    };
    let (one, other) = (read(first)?, read(second)?);
    let (largest, relative) = if one.numel() == 0 {
        (0.0, 0.0)
    } else {
        let apart = &one - &other;
        let length = |tensor: &Tensor| tensor.to_kind(Kind::Double).square().sum(Kind::Double).double_value(&[]).sqrt();
        let (whole, missed) = (length(&one), length(&apart));
        let relative = match (missed, whole) {
            (0.0, _) => 0.0,
            // Of zeros, everything is infinitely far.
            (_, 0.0) => f64::INFINITY,
            (missed, whole) => missed / whole,
        };
        (apart.abs().max().double_value(&[]), relative)
    };
    let alike = found.stored[0] == found.stored[1];
    if relative <= tolerance && (alike || tolerance > 0.0) {
        return Ok(None);
    }
    found.largest = Some(largest);
    // JSON has no infinity.
    found.relative = Some(relative).filter(|relative| relative.is_finite());
    Ok(Some(found))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

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
}
