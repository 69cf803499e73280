//! Taking up a saved state.

use tch::{Tensor, no_grad};

use crate::{Error, Fault, Result};

/// Copies saved tensors into live ones of the same names and shapes.
///
/// # Errors
/// [`Error::State`] naming the first tensor that is missing, left over, or of another shape or number type; nothing is copied then.
pub fn restore(live: &[(String, Tensor)], saved: &[(String, Tensor)], place: &std::path::Path) -> Result<()> {
    let refuse = |what: String| {
        let hint = "the state belongs to another adapter or optimizer; train with the recipe it was saved under";
        Err(Error::State(Fault::at(place, what).hint(hint)))
    };
    let saved: std::collections::BTreeMap<_, _> = saved.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    for (name, tensor) in live {
        match saved.get(name.as_str()) {
            None => return refuse(format!("has no tensor `{name}`")),
            Some(found) if found.size() != tensor.size() => {
                return refuse(format!("`{name}` has shape {:?}, expected {:?}", found.size(), tensor.size()));
            }
            Some(found) if found.kind() != tensor.kind() => {
                return refuse(format!("`{name}` holds {:?} numbers, expected {:?}", found.kind(), tensor.kind()));
            }
            Some(_) => {}
        }
    }
    if let Some(name) = saved.keys().find(|name| !live.iter().any(|(other, _)| other == **name)) {
        return refuse(format!("has a tensor `{name}` that the run does not have"));
    }
    no_grad(|| live.iter().for_each(|(name, tensor)| tensor.shallow_clone().copy_(saved[name.as_str()])));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(values: &[f32], shape: &[i64]) -> Tensor {
        Tensor::from_slice(values).reshape(shape).set_requires_grad(true)
    }

    fn two_parameters() -> Vec<(String, Tensor)> {
        vec![("p".into(), leaf(&[0.5, -1.25, 2.0, 0.1, 0.0, -0.3], &[2, 3])), ("q".into(), leaf(&[1.0, -2.0], &[2]))]
    }

    #[test]
    fn restoring_refuses_other_shapes_and_names() {
        let live = two_parameters();
        let place = std::path::Path::new("adapter.safetensors");
        let text = |saved: &[(String, Tensor)]| restore(&live, saved, place).unwrap_err().to_string();
        let mut saved = two_parameters();
        saved[1].1 = leaf(&[1.0, 2.0, 3.0], &[3]);
        assert!(text(&saved).contains("`q` has shape [3], expected [2]"));
        saved.pop();
        assert!(text(&saved).contains("has no tensor `q`"));
        let mut saved = two_parameters();
        saved[1].1 = saved[1].1.to_kind(tch::Kind::Double);
        assert!(text(&saved).contains("`q` holds Double numbers, expected Float"));
        let mut saved = two_parameters();
        saved.push(("r".into(), leaf(&[1.0], &[1])));
        assert!(text(&saved).contains("`r` that the run does not have"));
    }
}
