//! Tokens added to a model's tokenizer.

use std::collections::BTreeMap;

use serde_json::{Value as Json, json};
use tokenizers::AddedToken;

use super::files::read_tokenizer;
use crate::{Error, Fault, Result};

/// Adds tokens to a model's small files, as transformers' `add_tokens` does: found wherever their text is, before anything else is
/// looked at. Gives their ids. Where these are beyond the rows of the model, `config.json` says how many there are now.
///
/// # Errors
/// [`Error::Recipe`] for a token that is there already, or is named twice; those of [`super::Tokenizer::new`].
pub fn add_tokens(sidecars: &mut BTreeMap<String, Vec<u8>>, tokens: &[String]) -> Result<Vec<u32>> {
    let fault = |what: String, hint: &str| Err(Error::Recipe(vec![Fault::new("adapter.new_tokens", what).hint(hint)]));
    let mut inner = read_tokenizer(sidecars, &mut Vec::new())?;
    let mut file: Json = json_of(sidecars, "tokenizer.json")?;
    let mut ids = Vec::new();
    for token in tokens {
        if let Some(id) = inner.token_to_id(token) {
            let hint = "name that id in adapter.trainable_token_indices instead, to train its row";
            return fault(format!("'{token}' is a token already, {id}"), hint);
        }
        inner.add_tokens([AddedToken::from(token.clone(), false).normalized(false)]).map_err(|error| {
            Error::Model(Fault::new("tokenizer.json", format!("'{token}' cannot be added: {error}")))
        })?;
        let Some(id) = inner.token_to_id(token) else {
            return fault(format!("'{}' cannot be a token", token.escape_debug()), "leave it out");
        };
        ids.push(id);
        let entry = json!({
            "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": false,
        });
        match &mut file["added_tokens"] {
            Json::Array(all) => all.push(entry),
            other => *other = json!([entry]),
        }
    }
    sidecars.insert("tokenizer.json".into(), format!("{file:#}\n").into_bytes());
    if let Some(rows) = ids.iter().max().map(|id| u64::from(*id) + 1) {
        grow_config(sidecars, rows)?;
    }
    Ok(ids)
}

/// Makes `config.json` say that there are so many rows, where it says fewer.
fn grow_config(sidecars: &mut BTreeMap<String, Vec<u8>>, rows: u64) -> Result<()> {
    if !sidecars.contains_key("config.json") {
        return Ok(());
    }
    let mut config = json_of(sidecars, "config.json")?;
    if grow(&mut config, rows) {
        sidecars.insert("config.json".into(), format!("{config:#}\n").into_bytes());
    }
    Ok(())
}

/// Makes a model's configuration say that it has so many tokens, where it says fewer; whether it did.
pub fn grow(config: &mut Json, rows: u64) -> bool {
    let mut grown = false;
    let mut own = |value: &mut Json| {
        if value.as_u64().is_some_and(|size| size < rows) {
            (*value, grown) = (json!(rows), true);
        }
    };
    if let Some(fields) = config.as_object_mut() {
        fields.get_mut("vocab_size").map(&mut own);
        fields.get_mut("text_config").and_then(|text| text.get_mut("vocab_size")).map(&mut own);
    }
    grown
}

fn json_of(sidecars: &BTreeMap<String, Vec<u8>>, name: &str) -> Result<Json> {
    let bytes = sidecars.get(name).map(Vec::as_slice).unwrap_or_default();
    serde_json::from_slice(bytes).map_err(|error| Error::Model(Fault::new(name, error)))
}
