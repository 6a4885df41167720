//! Which of a model's GGUF files is meant: by its name, or by how its weights are quantised (`owner/name:Q4_K_M`).

use tidemill_engine::gguf::PartName;

/// Whether a file is named as GGUF files are, and is not a later part of one.
pub(super) fn is_gguf(name: &str) -> bool {
    name.to_ascii_lowercase().ends_with(EXTENSION)
        && PartName::parse(name).is_none_or(|part| part.number == 1)
}

/// The files that belong to the one that was chosen, itself first.
pub(super) fn files_of_choice(name: &str) -> Vec<String> {
    PartName::parse(name).map_or_else(|| vec![name.to_owned()], |part| part.all().collect())
}

/// The one that `wanted` names: a file, or the end of a file's name before its extension.
///
/// # Errors
///
/// Those that are there, when none or several fit.
pub(super) fn choose(names: &[String], wanted: &str) -> Result<String, Vec<String>> {
    let files: Vec<&String> = names.iter().filter(|name| is_gguf(name)).collect();
    let fits = |name: &&&String| if is_gguf(wanted) { **name == wanted } else { has_kind(name, wanted) };
    match files.iter().filter(fits).collect::<Vec<_>>()[..] {
        [only] => Ok((*only).clone()),
        _ => Err(files.into_iter().cloned().collect()),
    }
}

/// Names for a message, the first few.
pub(super) fn shown(names: &[String]) -> String {
    let mut text = names.iter().take(MOST_SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    if names.is_empty() {
        text.push_str("(it has none)");
    }
    if MOST_SHOWN < names.len() {
        text.push_str(", …");
    }
    text
}

/// Whether a file's name ends in `-kind.gguf`, or `.kind.gguf`, but for the numbers of a part.
fn has_kind(name: &str, kind: &str) -> bool {
    let whole = PartName::parse(name).map(|part| format!("{}{EXTENSION}", part.stem()));
    let name = whole.as_deref().unwrap_or(name).to_ascii_lowercase();
    let before = name.strip_suffix(EXTENSION).and_then(|stem| stem.strip_suffix(&kind.to_ascii_lowercase()));
    before.is_some_and(|before| before.ends_with(['-', '.', '_', '/']))
}

const EXTENSION: &str = ".gguf";
const MOST_SHOWN: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_by_name_and_by_kind() {
        let names =
            ["README.md", "m-Q4_0.gguf", "m-Q4_K_M.gguf", "m-IQ4_K_M.gguf", "m.f16.gguf", "big/m-Q8_0.gguf"];
        let parts = ["big/m-BF16-00001-of-00002.gguf", "big/m-BF16-00002-of-00002.gguf"];
        let names: Vec<String> = names.into_iter().chain(parts).map(str::to_owned).collect();
        #[rustfmt::skip]
        let rows = [
            ("a name",                      "m-Q4_0.gguf",      Some("m-Q4_0.gguf")),
            ("a kind",                      "Q4_0",             Some("m-Q4_0.gguf")),
            ("a kind that ends another",    "Q4_K_M",           Some("m-Q4_K_M.gguf")),
            ("in small letters",            "q8_0",             Some("big/m-Q8_0.gguf")),
            ("after a dot",                 "F16",              Some("m.f16.gguf")),
            ("what ends two of them",       "K_M",              None),
            ("a kind in parts",             "BF16",             Some(parts[0])),
            ("the first part by name",      parts[0],           Some(parts[0])),
            ("a later part",                parts[1],           None),
            ("another name",                "x.gguf",           None),
            ("no GGUF file",                "README.md",        None),
        ];
        for (row, wanted, expected) in rows {
            assert_eq!(choose(&names, wanted).ok().as_deref(), expected, "{row}");
        }
        assert_eq!(choose(&names, "Q2_K").expect_err("there is none").len(), 6);
        assert_eq!(files_of_choice(parts[0]), parts);
        assert_eq!(files_of_choice("m-Q4_0.gguf"), ["m-Q4_0.gguf"]);
        assert_eq!(shown(&names[1..3]), "m-Q4_0.gguf, m-Q4_K_M.gguf");
    }
}
