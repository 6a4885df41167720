//! Typed reading of JSON objects, with errors that name the file and the field.
//!
//! Not serde's derive: half of a model's fields depend on others, come in two spellings, or have a default that
//! another field decides, and its messages do not name the path of the field.

use serde_json::{Map, Value};

use super::error::ModelError;

/// An object of a JSON file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fields<'a> {
    file: &'a str,
    /// Path of the object in the file: empty, or ending in a dot.
    prefix: &'a str,
    values: &'a Map<String, Value>,
}

/// Reads a whole file as JSON.
pub(crate) fn parse(file: &str, bytes: &[u8]) -> Result<Value, ModelError> {
    serde_json::from_slice(bytes).map_err(|source| ModelError::Json { file: file.into(), source })
}

impl<'a> Fields<'a> {
    /// The top of a file.
    pub(super) fn of(file: &'a str, value: &'a Value) -> Result<Self, ModelError> {
        let Some(values) = value.as_object() else {
            return Err(ModelError::BadField {
                file: file.into(),
                field: "(top)".into(),
                expected: "an object".into(),
                found: shown(value),
            });
        };
        Ok(Self { file, prefix: "", values })
    }

    /// The object under `name`, whose path is `prefix`; `None` when it is absent or null.
    pub(super) fn object(&self, name: &str, prefix: &'a str) -> Result<Option<Self>, ModelError> {
        match self.value(name) {
            None => Ok(None),
            Some(Value::Object(values)) => Ok(Some(Self { file: self.file, prefix, values })),
            Some(other) => Err(self.bad(name, "an object or null", other)),
        }
    }

    /// The value under `name`; `None` when it is absent or null.
    pub(super) fn value(&self, name: &str) -> Option<&'a Value> {
        self.values.get(name).filter(|value| !value.is_null())
    }

    /// Whether `name` is there, be it null.
    pub(super) fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// The names of all fields.
    pub(super) fn names(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.values.keys().map(String::as_str)
    }

    /// The name of a field whose value is an object.
    pub(super) fn nested(&self) -> Option<&'a str> {
        self.values.iter().find(|(_, value)| value.is_object()).map(|(name, _)| name.as_str())
    }

    /// A whole number from 1.
    pub(super) fn count(&self, name: &str) -> Result<Option<u32>, ModelError> {
        self.typed(name, "a whole number from 1", |value| {
            value.as_u64().and_then(|number| u32::try_from(number).ok()).filter(|number| 0 < *number)
        })
    }

    /// A whole number from 0.
    pub(super) fn index(&self, name: &str) -> Result<Option<u32>, ModelError> {
        self.typed(name, "a whole number", |value| {
            value.as_u64().and_then(|number| u32::try_from(number).ok())
        })
    }

    /// A number.
    pub(super) fn number(&self, name: &str) -> Result<Option<f64>, ModelError> {
        self.typed(name, "a number", Value::as_f64)
    }

    /// A number above 0.
    pub(super) fn positive(&self, name: &str) -> Result<Option<f64>, ModelError> {
        self.typed(name, "a number above 0", |value| value.as_f64().filter(|number| 0.0 < *number))
    }

    /// True or false.
    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>, ModelError> {
        self.typed(name, "true or false", Value::as_bool)
    }

    /// A text.
    pub(super) fn text(&self, name: &str) -> Result<Option<&'a str>, ModelError> {
        self.typed(name, "a text", Value::as_str)
    }

    /// A list of texts.
    pub(super) fn texts(&self, name: &str) -> Result<Option<Vec<&'a str>>, ModelError> {
        self.typed(name, "a list of texts", |value| value.as_array()?.iter().map(Value::as_str).collect())
    }

    /// One token id or a list of them; empty when there is none.
    pub(super) fn tokens(&self, name: &str) -> Result<Vec<u32>, ModelError> {
        let id = |value: &Value| value.as_u64().and_then(|number| u32::try_from(number).ok());
        let ids = self.typed(name, "a token id or a list of token ids", |value| match value {
            Value::Array(values) => values.iter().map(id).collect(),
            single => id(single).map(|single| vec![single]),
        })?;
        Ok(ids.unwrap_or_default())
    }

    /// What is found under `name`, or the error that it is missing.
    pub(super) fn required<T>(&self, name: &str, found: Option<T>) -> Result<T, ModelError> {
        found.ok_or_else(|| ModelError::MissingField { file: self.file.into(), field: self.path(name) })
    }

    /// The error that `name` asks for something that is not supported.
    pub(super) fn unsupported(&self, name: &str, supported: &str) -> ModelError {
        let found = self.values.get(name).map_or_else(|| "missing".into(), shown);
        ModelError::Unsupported {
            file: self.file.into(),
            field: self.path(name),
            found,
            supported: supported.into(),
        }
    }

    /// The error that `name` cannot be what it says.
    pub(super) fn invalid(&self, name: &str, expected: impl Into<String>) -> ModelError {
        let found = self.values.get(name).map_or_else(|| "nothing".into(), shown);
        ModelError::BadField {
            file: self.file.into(),
            field: self.path(name),
            expected: expected.into(),
            found,
        }
    }

    fn typed<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ModelError> {
        let Some(value) = self.value(name) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.bad(name, expected, value))
    }

    fn bad(&self, name: &str, expected: &str, found: &Value) -> ModelError {
        ModelError::BadField {
            file: self.file.into(),
            field: self.path(name),
            expected: expected.into(),
            found: shown(found),
        }
    }

    fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }
}

/// A value for an error message: JSON, cut where it gets long.
fn shown(value: &Value) -> String {
    let mut text = value.to_string();
    if let Some((cut, _)) = text.char_indices().nth(LONGEST_SHOWN) {
        text.truncate(cut);
        text.push('…');
    }
    text
}

const LONGEST_SHOWN: usize = 80;
