//! JSON as Python's `json.dumps(…, ensure_ascii=False)` writes it, to the last space.

use minijinja::value::{Value, ValueKind};
use minijinja::{Error, ErrorKind};

/// How the text is laid out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Style {
    indent: Option<usize>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

impl Style {
    /// Python's defaults: with an indent the comma has no space after it.
    pub(super) fn new(indent: Option<usize>, separators: Option<(String, String)>, sort_keys: bool) -> Self {
        let (item_separator, key_separator) = separators.unwrap_or_else(|| {
            let item = if indent.is_some() { "," } else { ", " };
            (item.to_owned(), ": ".to_owned())
        });
        Self { indent, item_separator, key_separator, sort_keys }
    }
}

/// The JSON text of `value`.
pub(super) fn dumps(value: &Value, style: &Style) -> Result<String, Error> {
    let mut out = String::new();
    write(value, style, 0, &mut out)?;
    Ok(out)
}

fn write(value: &Value, style: &Style, depth: usize, out: &mut String) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => out.push_str("null"),
        ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => out.push_str(&number(value)),
        ValueKind::String => string(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            brackets(['[', ']'], &items, style, depth, out, |item, out| write(item, style, depth + 1, out))?;
        }
        ValueKind::Map => {
            let mut entries = value
                .try_iter()?
                .map(|key| Ok((key_text(&key)?, value.get_item(&key)?)))
                .collect::<Result<Vec<_>, Error>>()?;
            if style.sort_keys {
                entries.sort_by(|left, right| left.0.cmp(&right.0));
            }
            brackets(['{', '}'], &entries, style, depth, out, |(key, item), out| {
                string(key, out);
                out.push_str(&style.key_separator);
                write(item, style, depth + 1, out)
            })?;
        }
        kind => {
            let message = format!("object of type {kind} is not JSON serializable");
            return Err(Error::new(ErrorKind::InvalidOperation, message));
        }
    }
    Ok(())
}

fn brackets<T>(
    [open, close]: [char; 2],
    items: &[T],
    style: &Style,
    depth: usize,
    out: &mut String,
    mut write_item: impl FnMut(&T, &mut String) -> Result<(), Error>,
) -> Result<(), Error> {
    let new_line = |out: &mut String, depth: usize| {
        if let (Some(indent), false) = (style.indent, items.is_empty()) {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    };
    out.push(open);
    for (index, item) in items.iter().enumerate() {
        if index != 0 {
            out.push_str(&style.item_separator);
        }
        new_line(out, depth + 1);
        write_item(item, out)?;
    }
    new_line(out, depth);
    out.push(close);
    Ok(())
}

fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(key.as_str().unwrap_or_default().to_owned()),
        ValueKind::None => Ok("null".to_owned()),
        ValueKind::Bool => Ok(if key.is_true() { "true" } else { "false" }.to_owned()),
        ValueKind::Number => Ok(number(key)),
        kind => {
            let message = format!("keys must be str, int, float, bool or None, not {kind}");
            Err(Error::new(ErrorKind::InvalidOperation, message))
        }
    }
}

/// Numbers as Python's `repr` writes them.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let float = f64::try_from(value.clone()).unwrap_or(f64::NAN);
    if float.is_nan() {
        return "NaN".to_owned();
    }
    if float.is_infinite() {
        return if float < 0.0 { "-Infinity" } else { "Infinity" }.to_owned();
    }
    let magnitude = float.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        // Python writes the exponent with its sign and two digits.
        let text = format!("{float:e}");
        let (digits, exponent) = text.split_once('e').expect("the format has an exponent");
        let exponent: i32 = exponent.parse().expect("the format's exponent is a whole number");
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{digits}e{sign}{:02}", exponent.abs());
    }
    format!("{float:?}")
}

fn string(text: &str, out: &mut String) {
    out.push('"');
    for character in text.chars() {
        match character {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            control if control < ' ' => out.push_str(&format!("\\u{:04x}", u32::from(control))),
            other => out.push(other),
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_that_of_python() {
        let value = |json: &str| {
            Value::from(minijinja::value::Serde(serde_json::from_str::<serde_json::Value>(json).unwrap()))
        };
        let plain = Style::new(None, None, false);
        let pretty = Style::new(Some(2), None, false);
        let rows: &[(&str, &Style, &str, &str)] = &[
            ("order of keys is kept", &plain, r#"{"b":1,"a":[true,null]}"#, r#"{"b": 1, "a": [true, null]}"#),
            (
                "sorted when asked for",
                &Style::new(None, None, true),
                r#"{"b":1,"a":2}"#,
                r#"{"a": 2, "b": 1}"#,
            ),
            (
                "separators",
                &Style::new(None, Some((",".into(), ":".into())), false),
                r#"{"b":[1,2]}"#,
                r#"{"b":[1,2]}"#,
            ),
            (
                "empty brackets stay together",
                &pretty,
                r#"{"a":[],"b":{}}"#,
                "{\n  \"a\": [],\n  \"b\": {}\n}",
            ),
            ("indent", &pretty, r#"{"a":[1,2]}"#, "{\n  \"a\": [\n    1,\n    2\n  ]\n}"),
            ("nothing is escaped for HTML or ASCII", &plain, r#""<é&'>""#, r#""<é&'>""#),
            ("control characters are", &plain, r#""\u0001\n\"\\""#, r#""\u0001\n\"\\""#),
            (
                "floats as repr",
                &plain,
                "[1.0, 0.5, 1e16, 1e-5, 123456789.25]",
                "[1.0, 0.5, 1e+16, 1e-05, 123456789.25]",
            ),
            ("whole numbers", &plain, "[0, -7, 18446744073709551615]", "[0, -7, 18446744073709551615]"),
        ];
        for (rule, style, json, expected) in rows {
            assert_eq!(dumps(&value(json), style).unwrap(), *expected, "{rule}");
        }
        assert!(dumps(&Value::UNDEFINED, &plain).is_err(), "undefined is no JSON");
    }
}
