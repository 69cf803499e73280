//! The proof that a file is its model: what it will say is read again, and must be the same spec.

use std::path::Path;

use serde_json::Value as Json;

use super::metadata::window;
use crate::model::spec::Mask;
use crate::model::{ModelSpec, families};
use crate::weights::gguf::{Architecture, Field};
use crate::{Error, Fault, Result};

/// Proves that a file of these settings is the model: reads them as `shown` and compares. What llama.cpp is known to pass over is said in
/// `notices`; all else that differs is an error.
pub(super) fn prove(
    path: &Path,
    spec: &ModelSpec,
    architecture: &Architecture,
    shown: &Json,
    notices: &mut Vec<String>,
) -> Result<()> {
    let honours_windows = architecture
        .fields
        .iter()
        .copied()
        .flatten()
        .any(|field| matches!(field, Field::Required("attention.sliding_window", _)));
    let comparable = |spec: &ModelSpec| {
        let mut spec = ModelSpec {
            model_type: String::new(),
            names: Default::default(),
            ignored_suffixes: Vec::new(),
            ignored_prefixes: Vec::new(),
            ..spec.clone()
        };
        // Where it is not shared, both have the tensor; where it must be there, it is there twice.
        spec.head.tied = false;
        if !honours_windows {
            spec.layers.iter_mut().filter(|layer| window(layer).is_some()).for_each(|layer| layer.mask = Mask::Full);
        }
        spec
    };
    let read = families::from_config(shown)?;
    let [ours, theirs] = [spec, &read].map(|spec| format!("{:#?}", comparable(spec)));
    if let Some((place, ours, theirs)) = difference(&ours, &theirs) {
        let what = format!(
            "llama.cpp's {} would compute another model: {place} is {ours} here, but {theirs} there",
            architecture.name
        );
        return Err(Error::Output(
            Fault::at(path, what).hint("export to another target, such as transformers or vllm"),
        ));
    }
    let window = spec.layers.iter().filter_map(window).min();
    if let Some(window) = window.filter(|_| !honours_windows) {
        notices.push(format!(
            "llama.cpp lets every token of a {} see all before it, this model {window} of them: longer documents are answered otherwise",
            architecture.name
        ));
    }
    Ok(())
}

/// The first place at which two things printed alike differ, and how; numbers that went through fp32 do not.
fn difference(ours: &str, theirs: &str) -> Option<(String, String, String)> {
    let mut path: Vec<(usize, &str)> = Vec::new();
    let (mut own, mut other) = (ours.lines(), theirs.lines());
    loop {
        let (mine, yours) = (own.next(), other.next());
        let (Some(line), Some(read)) = (mine, yours) else {
            return (mine != yours).then(|| (place(&path), "one length".into(), "another".into()));
        };
        let indent = line.len() - line.trim_start().len();
        while path.last().is_some_and(|(outer, _)| *outer >= indent) {
            path.pop();
        }
        if line != read && !alike(line, read) {
            let told = |line: &str| line.trim().trim_end_matches([',', '{', '(', '[']).trim().to_string();
            return Some((place(&path), told(line), told(read)));
        }
        if line.ends_with(['{', '(', '[']) {
            path.push((indent, line.trim().trim_end_matches(['{', '(', '[']).trim().trim_end_matches(':')));
        }
    }
}

fn place(path: &[(usize, &str)]) -> String {
    let parts: Vec<&str> = path.iter().skip(1).map(|(_, part)| *part).filter(|part| !part.is_empty()).collect();
    if parts.is_empty() { "the model".into() } else { parts.join(" > ") }
}

fn alike(ours: &str, theirs: &str) -> bool {
    let split = |line: &str| -> Option<(String, f64)> {
        let line = line.trim_end_matches(',');
        let at = line.rfind(' ').map_or(0, |at| at + 1);
        Some((line[..at].to_string(), line[at..].parse().ok()?))
    };
    match (split(ours), split(theirs)) {
        (Some((label, ours)), Some((other, theirs))) => {
            label == other && (ours - theirs).abs() <= 2e-6 * ours.abs().max(theirs.abs())
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_told_with_their_place_and_rounding_is_none() {
        #[derive(Debug)]
        struct Inner {
            #[allow(dead_code)]
            scale: f64,
        }
        #[derive(Debug)]
        struct Outer {
            #[allow(dead_code)]
            inner: Vec<Inner>,
            #[allow(dead_code)]
            cap: Option<f64>,
        }
        let text = |scale: f64, cap: Option<f64>| format!("{:#?}", Outer { inner: vec![Inner { scale }], cap });
        assert_eq!(difference(&text(0.1, None), &text(0.1f32 as f64, None)), None);
        let (place, ours, theirs) = difference(&text(0.1, None), &text(0.2, None)).unwrap();
        assert_eq!((place.as_str(), ours.as_str(), theirs.as_str()), ("inner > Inner", "scale: 0.1", "scale: 0.2"));
        assert!(difference(&text(0.1, None), &text(0.1, Some(5.0))).is_some());
    }
}
