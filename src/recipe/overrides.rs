//! `--set a.b.c=value`: typed on the command line, put into the tree as if it stood in the file.
//!
//! Nothing is checked against the schema here: an unknown key is found with all others, at the place `--set a.b.c=value`.

use super::tree::{Entry, Node, Place, Problem, Value, shorten};

/// Puts each override into `tree`, a mapping; a later one wins over an earlier one of the same key.
pub(super) fn apply(tree: &mut Node, overrides: &[String]) -> Vec<Problem> {
    overrides.iter().filter_map(|typed| apply_one(tree, typed).err()).collect()
}

fn apply_one(tree: &mut Node, typed: &str) -> Result<(), Problem> {
    let place = Place::Override(shorten(typed).escape_debug().to_string());
    let problem = |what: String, hint: &str| Problem::new(&place, what, hint);
    let Some((path, value)) = typed.split_once('=') else {
        return Err(problem("has no value".into(), "write it as key=value, as in training.learning_rate=1e-4"));
    };
    let keys: Vec<&str> = path.trim().split('.').collect();
    if keys.iter().any(|key| key.is_empty()) {
        return Err(problem(format!("`{path}` is not a key"), "write a path of keys, as in training.learning_rate"));
    }
    let mut value = value_node(value.trim(), &place)?;
    value.move_to(&place);

    let mut node = tree;
    for (depth, key) in keys.iter().enumerate() {
        if matches!(node.value, Value::Null) {
            *node = Node::typed(Value::Map(Vec::new()), "", place.clone());
        }
        let found = node.found();
        let Value::Map(entries) = &mut node.value else {
            let above = keys[..depth].join(".");
            let what = format!("`{above}` is {found} in the recipe, so `{key}` cannot be set in it");
            return Err(problem(what, &format!("set the whole of it: --set '{above}=...'")));
        };
        let index = entries.iter().position(|entry| entry.key == *key).unwrap_or_else(|| {
            let node = Node::typed(Value::Null, "", place.clone());
            entries.push(Entry { key: (*key).to_string(), place: place.clone(), node });
            entries.len() - 1
        });
        if depth + 1 == keys.len() {
            entries[index].place = place.clone();
            entries[index].node = value;
            return Ok(());
        }
        node = &mut entries[index].node;
    }
    Ok(())
}

/// The value as YAML would read it, but a plain text stays as typed whatever YAML's signs are in it: a glob `*.parquet`
/// is no alias, `You are: x` no mapping and `a #b` no comment. Lists, mappings and quoted texts are YAML.
fn value_node(typed: &str, place: &Place) -> Result<Node, Problem> {
    let parsed = Node::parse(typed, "value");
    if typed.starts_with(['[', '{', '"', '\'']) {
        let hint = "a text that starts with a bracket must be quoted: --set 'key=\"[qk]_proj\"'";
        return parsed.map_err(|fault| Problem::new(place, fault.what, hint));
    }
    match parsed {
        Ok(node) if matches!(node.value, Value::Bool(_) | Value::Integer(_) | Value::Float(_)) => Ok(node),
        Ok(node) if matches!(node.value, Value::Null) && matches!(typed, "" | "~" | "null") => Ok(node),
        _ => Ok(Node::typed(Value::Text(typed.to_string()), typed, place.clone())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tree() -> Node {
        Node::parse("a: {b: 1}\nlist: [1]\nempty:\n", "r.yaml").unwrap()
    }

    fn set(typed: &[&str]) -> Result<serde_json::Value, String> {
        let mut tree = tree();
        let typed: Vec<String> = typed.iter().map(ToString::to_string).collect();
        let faults = apply(&mut tree, &typed);
        if faults.is_empty() {
            Ok(tree.json())
        } else {
            Err(faults.into_iter().map(|problem| problem.fault("r.yaml").to_string()).collect::<Vec<_>>().join("\n"))
        }
    }

    #[test]
    fn values_are_typed_and_later_ones_win() {
        let json = set(&["a.b=1e-4", "a.c=true", "empty.x=7", "new.deep=[1, {k: v}]", "a.c=no", "list=~"]).unwrap();
        assert_eq!(
            json,
            json!({"a": {"b": 1e-4, "c": "no"}, "list": null, "empty": {"x": 7}, "new": {"deep": [1, {"k": "v"}]}})
        );
    }

    #[test]
    fn plain_texts_stay_as_typed() {
        for text in ["*.parquet", "You are: x", "a #b", "data/[ab]*.parquet", "!x", "@x", "- a", "x=y", "# x", "a\tb"] {
            assert_eq!(set(&[&format!("a.b={text}")]).unwrap()["a"]["b"], json!(text));
        }
        assert_eq!(set(&["a.b=\"1\""]).unwrap()["a"]["b"], json!("1"));
        assert_eq!(set(&["a.b="]).unwrap()["a"]["b"], json!(null));
    }

    #[test]
    fn what_cannot_be_set_is_said_all_at_once() {
        let faults = set(&["a.b", ".x=1", "a..b=1", "list.0=1", "a.b.c=1", "a.b=[1"]).unwrap_err();
        for part in [
            "--set a.b: has no value",
            "--set .x=1: `.x` is not a key",
            "`list` is a list in the recipe",
            "`a.b` is the number 1 in the recipe",
            "--set a.b=[1: not valid YAML",
        ] {
            assert!(faults.contains(part), "{part} not in\n{faults}");
        }
    }

    #[test]
    fn an_override_has_its_own_place() {
        let mut tree = tree();
        apply(&mut tree, &["a.b=[x]".into()]);
        assert_eq!(tree.place_of("a.b").show("r.yaml"), "--set a.b=[x]");
        assert_eq!(tree.place_of("list").show("r.yaml"), "r.yaml:2:7");
    }
}
