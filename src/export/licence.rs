//! The licence of a base, and what it asks of those who publish what was made of it.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::recipe::BaseSource;
use crate::weights::Checkpoint;
use crate::weights::hub::Hub;

/// Longest card that is read.
const MOST_BYTES: u64 = 1 << 20;

/// What a base's card says of its licence.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Licence {
    /// The hub's name for it: `apache-2.0`, `llama3.1`, `other`; absent where the base does not say.
    pub id: Option<String>,
    /// Its own name, where it has no name on the hub.
    pub name: Option<String>,
    /// Where its text is.
    pub link: Option<String>,
    /// What it asks, in a sentence each, as far as it is known here: its text decides.
    pub restrictions: Vec<String>,
}

/// Licences by how their names begin, longer beginnings before those that they begin with themselves, and what they ask of a
/// fine-tuned model.
const KNOWN: &[(&str, &[&str])] = &[
    ("apache-2.0", &[]),
    ("mit", &[]),
    ("bsd", &[]),
    ("cc0", &[]),
    (
        "cc-by-nc-sa",
        &["Not for commercial use.", "The author must be named.", "What is made of it must be under the same licence."],
    ),
    (
        "cc-by-nc-nd",
        &["Not for commercial use.", "The author must be named.", "What is made of it must not be passed on."],
    ),
    ("cc-by-nc", &["Not for commercial use.", "The author must be named."]),
    ("cc-by-nd", &["The author must be named.", "What is made of it must not be passed on."]),
    ("cc-by-sa", &["The author must be named.", "What is made of it must be under the same licence."]),
    ("cc-by", &["The author must be named."]),
    (
        "llama2",
        &[
            "A copy of the licence and its notice must travel with the model.",
            "Not for improving other language models than Llama 2.",
            "Meta's acceptable use policy applies.",
            "Above 700 million monthly users a licence must be asked of Meta.",
        ],
    ),
    (
        "llama3",
        &[
            "\"Built with Meta Llama 3\" (from 3.1 on: \"Built with Llama\") must be shown where it is used.",
            "The model's name must begin with \"Llama 3\" (from 3.1 on: \"Llama\").",
            "A copy of the licence and its notice must travel with the model.",
            "Meta's acceptable use policy applies.",
            "Above 700 million monthly users a licence must be asked of Meta.",
        ],
    ),
    (
        "llama4",
        &[
            "\"Built with Llama\" must be shown where it is used.",
            "The model's name must begin with \"Llama\".",
            "A copy of the licence and its notice must travel with the model.",
            "Meta's acceptable use policy applies.",
            "Above 700 million monthly users a licence must be asked of Meta.",
        ],
    ),
    (
        "gemma",
        &[
            "Google's terms and prohibited use policy must be passed on to those who get the model.",
            "It must be said that files were changed.",
        ],
    ),
    ("bigscience", &["The use restrictions of its attachment must be passed on."]),
    ("bigcode-openrail", &["The use restrictions of its attachment must be passed on."]),
    ("openrail", &["The use restrictions of its attachment must be passed on."]),
    ("creativeml-openrail", &["The use restrictions of its attachment must be passed on."]),
    ("gpl", &["What is made of it must be under the same licence."]),
    ("agpl", &["What is made of it must be under the same licence, also where it is only served."]),
];

impl Licence {
    /// As the base's card beside its files says it; a hub's base is asked for its card, where the cache has none.
    pub fn of(checkpoint: &Checkpoint) -> Self {
        let beside = checkpoint.files.first().and_then(|file| file.parent()).and_then(read);
        let asked = || match (&checkpoint.source, &checkpoint.commit) {
            (BaseSource::Hub { id, .. }, Some(commit)) => Hub::from_environment().ok()?.card(id, commit),
            _ => None,
        };
        let card = beside.or_else(asked).unwrap_or_default();
        let own = checkpoint.config["license"].as_str().map(str::to_string);
        let said = Self::in_card(&card);
        if said.id.is_some() { said } else { Self { id: own.clone(), restrictions: asks(own.as_deref()), ..said } }
    }

    /// As a card's metadata says it.
    pub fn in_card(card: &str) -> Self {
        let metadata = metadata(card).unwrap_or_default();
        let text = |key: &str| {
            let value = metadata.get(key)?;
            let one = value.as_str().or_else(|| value.get(0)?.as_str())?;
            // It goes into a card of our own.
            let plain = one.trim().chars().all(|c| !c.is_control()) && (1..=200).contains(&one.trim().len());
            plain.then(|| one.trim().to_string())
        };
        let id = text("license").map(|id| id.to_lowercase());
        Self { restrictions: asks(id.as_deref()), id, name: text("license_name"), link: text("license_link") }
    }

    /// What a person calls it.
    pub fn called(&self) -> Option<&str> {
        self.name.as_deref().or(self.id.as_deref())
    }
}

fn asks(id: Option<&str>) -> Vec<String> {
    let Some(id) = id else { return Vec::new() };
    // What follows is a version or a variant, not the rest of another word.
    let goes_on = |rest: &str| !rest.starts_with(char::is_alphabetic);
    let known = KNOWN.iter().find(|(begin, _)| id.strip_prefix(begin).is_some_and(goes_on));
    match known {
        Some((_, asks)) => asks.iter().map(|one| (*one).to_string()).collect(),
        None => vec!["What it asks is not known here: read its text before publishing.".into()],
    }
}

fn read(folder: &Path) -> Option<String> {
    let path = folder.join("README.md");
    let metadata = path.metadata().ok()?;
    (metadata.is_file() && metadata.len() <= MOST_BYTES).then(|| std::fs::read_to_string(path).ok())?
}

/// The block between the two lines of dashes that a card begins with.
fn metadata(card: &str) -> Option<Value> {
    let rest = card.trim_start_matches('\u{feff}').strip_prefix("---")?;
    let rest = rest.strip_prefix("\r\n").or_else(|| rest.strip_prefix('\n'))?;
    let end = rest.find("\n---")?;
    serde_yaml::from_str(&rest[..=end]).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_card_says_the_licence_and_what_it_asks_is_named() {
        let licence = Licence::in_card("---\nlicense: llama3.1\nlanguage:\n- en\n---\n# Llama\n");
        assert_eq!(licence.id.as_deref(), Some("llama3.1"));
        assert!(licence.restrictions.iter().any(|one| one.contains("Built with Llama")), "{licence:?}");
        let other = "---\r\nlicense: other\r\nlicense_name: yi-license\r\nlicense_link: LICENSE\r\n---\r\n";
        let other = Licence::in_card(other);
        assert_eq!((other.called(), other.link.as_deref()), (Some("yi-license"), Some("LICENSE")));
        assert!(other.restrictions[0].contains("read its text"));
        assert_eq!(Licence::in_card("---\nlicense: [Apache-2.0]\n---\n").id.as_deref(), Some("apache-2.0"));
        assert_eq!(Licence::in_card("---\nlicense: apache-2.0\n---\n").restrictions, [""; 0]);
        let free = Licence::in_card("---\nlicense: cc-by-nc-4.0\n---\n").restrictions;
        assert_eq!(free, ["Not for commercial use.", "The author must be named."]);
    }

    /// Names of the hub's list of licences that begin alike.
    #[test]
    fn names_that_begin_alike_ask_different_things() {
        let (by, not_sold) = ("The author must be named.", "Not for commercial use.");
        let alike = "What is made of it must be under the same licence.";
        let kept = "What is made of it must not be passed on.";
        let served = "What is made of it must be under the same licence, also where it is only served.";
        let attachment = "The use restrictions of its attachment must be passed on.";
        let cases: &[(&[&str], &[&str])] = &[
            (&["cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"], &[by]),
            (&["cc-by-sa-3.0", "cc-by-sa-4.0"], &[by, alike]),
            (&["cc-by-nd-4.0"], &[by, kept]),
            (&["cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0"], &[not_sold, by]),
            (&["cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"], &[not_sold, by, alike]),
            (&["cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"], &[not_sold, by, kept]),
            (&["gpl", "gpl-2.0", "gpl-3.0"], &[alike]),
            (&["agpl-3.0"], &[served]),
            (&["cc0-1.0", "mit", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear"], &[]),
            (
                &[
                    "openrail",
                    "openrail++",
                    "bigscience-openrail-m",
                    "bigscience-bloom-rail-1.0",
                    "bigcode-openrail-m",
                    "creativeml-openrail-m",
                ],
                &[attachment],
            ),
        ];
        for (ids, expected) in cases {
            ids.iter().for_each(|id| assert_eq!(asks(Some(id)), *expected, "{id}"));
        }
        for (id, part) in [
            ("llama2", "other language models than Llama 2"),
            ("llama3", "\"Built with Meta Llama 3\""),
            ("llama3.3", "\"Llama 3\" (from 3.1 on"),
            ("llama4", "begin with \"Llama\"."),
        ] {
            assert!(asks(Some(id)).iter().any(|one| one.contains(part)), "{id}");
        }
        for id in ["cc", "lgpl-3.0", "unknown", "mitre", "gemmatic"] {
            assert!(asks(Some(id))[0].contains("is not known here"), "{id}");
        }
    }

    #[test]
    fn a_card_that_says_nothing_or_nonsense_gives_no_licence() {
        for card in [
            "",
            "# words",
            "---\nlicense: mit",
            "---\n- a\n---\n",
            "---\nlicense: {a: b}\n---\n",
            "---\nx: &a [*a]\n---\n",
        ] {
            assert_eq!(Licence::in_card(card), Licence::default(), "{card:?}");
        }
        let steering = format!("---\nlicense: \"a\\e[2J\"\nlicense_name: {}\n---\n", "x".repeat(300));
        assert_eq!(Licence::in_card(&steering), Licence::default());
    }
}
