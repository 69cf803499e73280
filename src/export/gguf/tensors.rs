//! Which tensors a file has, and what each is made of: the checkpoint's, by llama.cpp's names and in its order of rows.

use std::collections::BTreeMap;

use crate::model::ModelSpec;
use crate::model::names::Names;
use crate::weights::gguf::{Architecture, Conversion, Head, Heads, Rows};
use crate::weights::writer::TensorSpec;
use crate::{Error, Fault, Result};

/// A tensor of the file.
#[derive(Debug)]
pub(super) struct Target {
    /// Its GGUF name.
    pub name: String,
    /// Slowest dimension first.
    pub shape: Vec<i64>,
    pub order: Conversion,
    pub made_of: MadeOf,
}

/// What a tensor is made of.
#[derive(Debug)]
pub(super) enum MadeOf {
    /// Tensors of the checkpoint by their index, one after the other: one, or one of each expert.
    Parts(Vec<usize>),
    /// These numbers.
    Numbers(Vec<f32>),
}

/// The GGUF name of a tensor of the checkpoint, whichever way that spells it; with its order of rows, and its expert's number.
pub(super) fn named(architecture: &Architecture, names: &Names, stored: &str) -> Option<(String, Rows, Option<usize>)> {
    let spelled = names.spec_names(stored).flat_map(|name| [names.module(&name), name]);
    std::iter::once(stored.to_string()).chain(spelled).find_map(|name| architecture.to_gguf(&name))
}

/// The order of rows of a GGUF tensor.
pub(super) fn order(
    architecture: &Architecture,
    name: &str,
    rows: Rows,
    count: i64,
    heads: Heads,
) -> Result<Conversion> {
    if architecture.norms_from_one && name.ends_with("_norm.weight") {
        return Ok(Conversion::FromOne);
    }
    rows.order(count, heads).ok_or_else(|| {
        let what = format!("its {count} rows are not whole heads ({} query, {} key)", heads.query, heads.key);
        Error::Model(Fault::new(name, what))
    })
}

/// The tensors of the file, of those of the checkpoint (`stored`, with the update's in it), and of `derived` data; what is left out is
/// said in `notices`.
pub(super) fn targets(
    spec: &ModelSpec,
    architecture: &Architecture,
    heads: Heads,
    stored: &[TensorSpec],
    derived: &[(&'static str, Vec<f32>)],
    notices: &mut Vec<String>,
) -> Result<Vec<Target>> {
    let mut targets: Vec<Target> = derived
        .iter()
        .map(|(name, numbers)| Target {
            name: name.to_string(),
            shape: vec![numbers.len() as i64],
            order: Conversion::Same,
            made_of: MadeOf::Numbers(numbers.clone()),
        })
        .collect();
    // Where each tensor of experts is in `targets`, and its experts as far as they were found.
    let mut experts: BTreeMap<String, (usize, BTreeMap<usize, usize>)> = BTreeMap::new();
    let mut others = 0;
    for (index, tensor) in stored.iter().enumerate() {
        if spec.names.is_other_part(&tensor.name) {
            others += 1;
            continue;
        }
        let ignored = spec.ignored_suffixes.iter().any(|end| tensor.name.ends_with(end.as_str()))
            || spec.ignored_prefixes.iter().any(|start| tensor.name.starts_with(start.as_str()));
        let Some((name, rows, expert)) = named(architecture, &spec.names, &tensor.name) else {
            if ignored {
                continue;
            }
            let what = format!("llama.cpp's {} has no such tensor", architecture.name);
            let fault = Fault::new(&tensor.name, what).hint("export to another target, such as transformers or vllm");
            return Err(Error::Model(fault));
        };
        if let Some(number) = expert {
            let next = targets.len();
            let (_, found) = experts.entry(name.clone()).or_insert_with(|| (next, BTreeMap::new()));
            found.insert(number, index);
            if found.len() == 1 {
                let made_of = MadeOf::Parts(Vec::new());
                targets.push(Target { name, shape: tensor.shape.clone(), order: Conversion::Same, made_of });
            }
            continue;
        }
        let count = tensor.shape.first().copied().unwrap_or(0);
        let order = order(architecture, &name, rows, count, heads)?;
        targets.push(Target { name, shape: tensor.shape.clone(), order, made_of: MadeOf::Parts(vec![index]) });
    }
    for (name, (place, found)) in experts {
        let count = found.len();
        let whole = found.keys().copied().eq(0..count);
        let odd = found.values().find(|index| stored[**index].shape != targets[place].shape);
        if !whole || odd.is_some() {
            let what = format!("its {count} experts are not numbered 0 to {} and of one shape", count - 1);
            return Err(Error::Model(Fault::new(name, what)));
        }
        targets[place].shape.insert(0, count as i64);
        targets[place].made_of = MadeOf::Parts(found.into_values().collect());
    }
    settle_head(architecture, &mut targets)?;
    if others > 0 {
        notices.push(format!(
            "{others} tensors of other parts (pictures, sound) are left out: llama.cpp has them in a file of their own (mmproj)"
        ));
    }
    Ok(targets)
}

/// A head where llama.cpp looks for it.
fn settle_head(architecture: &Architecture, targets: &mut Vec<Target>) -> Result<()> {
    let own = targets.iter().any(|target| target.name == "output.weight");
    match architecture.head {
        Head::Embedding if own => {
            let what =
                format!("llama.cpp's {} answers with the embedding, but this head is another", architecture.name);
            let fault = Fault::new("the head", what).hint("export to another target, such as transformers or vllm");
            Err(Error::Model(fault))
        }
        Head::Own if !own => {
            let embedding = targets.iter().find_map(|target| match &target.made_of {
                MadeOf::Parts(parts) if target.name == "token_embd.weight" => {
                    Some((target.shape.clone(), parts.clone()))
                }
                _ => None,
            });
            let Some((shape, parts)) = embedding else { return Ok(()) };
            let made_of = MadeOf::Parts(parts);
            targets.push(Target { name: "output.weight".into(), shape, order: Conversion::Same, made_of });
            Ok(())
        }
        Head::Either | Head::Own | Head::Embedding => Ok(()),
    }
}
