//! Typed reading of `config.json`: every error names the field, what was found and what is expected.

use serde_json::Value;

use crate::{Error, Fault, Result};

/// A `config.json`, or an object inside it.
#[derive(Clone, Copy)]
pub(super) struct Config<'a> {
    value: &'a Value,
}

/// Larger sizes than any model's; keeps products of two of them within i64.
const LARGEST: i64 = 1 << 30;

impl<'a> Config<'a> {
    pub(super) fn new(value: &'a Value) -> Self {
        Self { value }
    }

    /// The field, unless absent or null.
    pub(super) fn field(&self, name: &str) -> Option<&'a Value> {
        self.value.get(name).filter(|v| !v.is_null())
    }

    pub(super) fn text(&self, name: &str) -> Result<&'a str> {
        let value = self.required(name)?;
        value.as_str().ok_or_else(|| wrong(name, value, "a string"))
    }

    /// A size: a whole number from 1 to 2^30.
    pub(super) fn size(&self, name: &str) -> Result<i64> {
        let value = self.required(name)?;
        value
            .as_i64()
            .filter(|n| (1..=LARGEST).contains(n))
            .ok_or_else(|| wrong(name, value, "a whole number from 1 to 2^30"))
    }

    pub(super) fn size_or(&self, name: &str, default: i64) -> Result<i64> {
        if self.field(name).is_some() { self.size(name) } else { Ok(default) }
    }

    /// A finite number above 0.
    pub(super) fn positive(&self, name: &str) -> Result<f64> {
        let value = self.required(name)?;
        value
            .as_f64()
            .filter(|x| x.is_finite() && *x > 0.0)
            .ok_or_else(|| wrong(name, value, "a finite number above 0"))
    }

    pub(super) fn positive_or(&self, name: &str, default: f64) -> Result<f64> {
        if self.field(name).is_some() { self.positive(name) } else { Ok(default) }
    }

    pub(super) fn flag_or(&self, name: &str, default: bool) -> Result<bool> {
        match self.field(name) {
            None => Ok(default),
            Some(value) => value.as_bool().ok_or_else(|| wrong(name, value, "true or false")),
        }
    }

    pub(super) fn object(&self, name: &str) -> Result<Option<Config<'a>>> {
        match self.field(name) {
            None => Ok(None),
            Some(value) if value.is_object() => Ok(Some(Config { value })),
            Some(value) => Err(wrong(name, value, "an object")),
        }
    }

    /// An error for each field that is set to something this program does not compute.
    pub(super) fn refuse(&self, fields: &[(&str, &str)]) -> Result<()> {
        for (name, feature) in fields {
            if let Some(value) = self.field(name)
                && value != &Value::Bool(false)
            {
                return Err(Error::Model(
                    Fault::new(
                        format!("config.json: {name}"),
                        format!("{} asks for {feature}, which is not supported", short(value)),
                    )
                    .hint("use a base without it"),
                ));
            }
        }
        Ok(())
    }

    fn required(&self, name: &str) -> Result<&'a Value> {
        self.field(name).ok_or_else(|| Error::Model(Fault::new(format!("config.json: {name}"), "missing")))
    }
}

/// The field's value is not of the expected sort.
pub(super) fn wrong(name: &str, found: &Value, expected: &str) -> Error {
    Error::Model(Fault::new(format!("config.json: {name}"), format!("{} found, {expected} expected", short(found))))
}

fn short(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 60 { text } else { text.chars().take(57).chain("...".chars()).collect() }
}
