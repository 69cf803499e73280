//! Whether two recipes train the same numbers, and where they do not.

use serde_json::{Map, Value};

use super::Recipe;

/// Keys that change what is written, shown or kept, never a number that is trained.
///
/// `training.threads` is among them because it is the machine's affair: a resumed run may be given another number of
/// threads. Sums may then be taken in another order, so bit-identity is promised only where the number stays.
const NEUTRAL: &[&str] = &[
    "output.dir",
    "output.save",
    "output.export",
    "output.tensorboard",
    "output.base_model_name_or_path",
    "training.logging_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.threads",
];

impl Recipe {
    /// The recipe as JSON with every default written out and without the keys that change no trained number: equal
    /// for two recipes exactly when [`Recipe::differences`] finds none.
    pub fn canonical_json(&self) -> Value {
        let mut leaves = Vec::new();
        // The structs hold only maps with text keys, which always have a JSON form.
        flatten("", serde_json::to_value(self).unwrap_or_default(), &mut leaves);
        Value::Object(leaves.into_iter().collect::<Map<_, _>>())
    }

    /// What differs from `other`, as `training.learning_rate: 0.0002 -> 0.0001` (this one's value first); empty when
    /// both train the same numbers.
    ///
    /// Not compared: `output.dir`, `output.save`, `output.export`, `output.tensorboard`, `output.base_model_name_or_path`,
    /// `training.logging_steps`, `training.save_steps`, `training.save_total_limit` and `training.threads`. They change
    /// what is written, shown or kept, so a run may be resumed with others.
    pub fn differences(&self, other: &Recipe) -> Vec<String> {
        let (mine, theirs) = (self.canonical_json(), other.canonical_json());
        let keys = mine.as_object().into_iter().flatten().chain(theirs.as_object().into_iter().flatten());
        let mut differences = Vec::new();
        for (key, _) in keys {
            let line = format!("{key}: {} -> {}", show(mine.get(key)), show(theirs.get(key)));
            if mine.get(key) != theirs.get(key) && !differences.contains(&line) {
                differences.push(line);
            }
        }
        differences
    }
}

/// Sections become dotted keys; a mapping that a person filled (`rank_pattern`, `columns`) stays whole.
fn flatten(path: &str, value: Value, leaves: &mut Vec<(String, Value)>) {
    match value {
        Value::Object(entries) if matches!(path, "" | "adapter" | "dataset" | "training" | "output") => {
            for (key, value) in entries {
                let inner = if path.is_empty() { key } else { format!("{path}.{key}") };
                flatten(&inner, value, leaves);
            }
        }
        _ if NEUTRAL.contains(&path) => {}
        leaf => leaves.push((path.to_string(), leaf)),
    }
}

fn show(value: Option<&Value>) -> String {
    match value {
        None | Some(Value::Null) => "(none)".into(),
        Some(Value::String(text)) => text.clone(),
        Some(value) => value.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::check::known_keys;
    use crate::recipe::json_schema;

    fn recipe(extra: &[(&str, Value)]) -> Recipe {
        let mut json =
            serde_json::json!({"base_model": "a/b", "dataset": {"train": "t.parquet"}, "output": {"dir": "o"}});
        for (path, value) in extra {
            *json.pointer_mut("").unwrap() = {
                let (section, key) = path.split_once('.').unwrap();
                let mut json = json.clone();
                json[section][key] = value.clone();
                json
            };
        }
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn each_difference_is_named_once_with_both_values() {
        let one = recipe(&[]);
        let other = recipe(&[
            ("training.learning_rate", 1e-4.into()),
            ("training.max_steps", 5.into()),
            ("adapter.rank_pattern", serde_json::json!({"q": 4})),
            ("dataset.train", serde_json::json!(["t.parquet", {"path": "u.parquet"}])),
        ]);
        assert_eq!(
            one.differences(&other),
            [
                "adapter.rank_pattern: {} -> {\"q\":4}",
                "dataset.train: t.parquet -> [\"t.parquet\",{\"path\":\"u.parquet\",\"weight\":1.0}]",
                "training.max_steps: (none) -> 5",
                "training.learning_rate: 0.0002 -> 0.0001",
            ]
        );
        assert_eq!(one.differences(&one.clone()), Vec::<String>::new());
    }

    #[test]
    fn what_changes_no_number_is_no_difference() {
        let other = recipe(&[
            ("output.dir", "elsewhere".into()),
            ("output.save", serde_json::json!(["merged"])),
            ("output.tensorboard", false.into()),
            ("training.save_steps", 7.into()),
            ("training.threads", 3.into()),
        ]);
        assert_eq!(recipe(&[]).differences(&other), Vec::<String>::new());
        assert_eq!(recipe(&[]).canonical_json(), other.canonical_json());
    }

    #[test]
    fn the_neutral_keys_exist() {
        let known = known_keys(&json_schema());
        assert!(NEUTRAL.iter().all(|key| known.iter().any(|known| known == key)));
    }
}
