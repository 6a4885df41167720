//! Tests that a guide names exist: a promise that points to nothing is none.

use std::path::Path;

use super::Source;

/// Guides whose tests are looked up.
const GUIDES: [&str; 1] = ["docs/guide/why-it-cannot-happen.md"];

pub(super) fn check(root: &Path, sources: &[Source]) -> Vec<String> {
    let mut findings = Vec::new();
    for guide in GUIDES {
        match std::fs::read_to_string(root.join(guide)) {
            Ok(text) => findings.extend(missing(guide, &text, sources)),
            Err(error) => findings.push(format!("{guide}: {error}")),
        }
    }
    findings
}

/// Names in backticks of the form `path/to/file.rs::test` whose test is not there.
fn missing(guide: &str, text: &str, sources: &[Source]) -> Vec<String> {
    let named = text.split('`').skip(1).step_by(2).filter_map(|quoted| quoted.split_once(".rs::"));
    named
        .filter(|(file, test)| {
            let path = format!("{file}.rs");
            let is_there = |source: &&Source| source.path == path && holds_test(&source.text, test);
            sources.iter().find(is_there).is_none()
        })
        .map(|(file, test)| format!("{guide}: there is no test {test} in {file}.rs"))
        .collect()
}

/// A function of that name right behind a test's attribute (others and comments may stand between), or in a block of
/// properties.
fn holds_test(text: &str, test: &str) -> bool {
    let mut is_test = false;
    for line in text.lines().map(str::trim_start) {
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            is_test = true;
        } else if line.starts_with("fn ") || line.starts_with("async fn ") {
            let name = line.trim_start_matches("async ").trim_start_matches("fn ");
            if is_test && name.strip_prefix(test).is_some_and(|rest| rest.starts_with('(')) {
                return true;
            }
            is_test = false;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_without_a_test_are_found() {
        let text = "#[test]\n#[ignore = \"slow\"]\nfn there() {}\n\nfn helper() {}\n#[tokio::test]\nasync fn later() {}\n";
        let sources = [Source { path: "a/b.rs".into(), text: text.into() }];
        let guide = "`a/b.rs::there`, `a/b.rs::later`, `a/b.rs::helper`, `a/b.rs::the`, `a/c.rs::there`, `cargo test`";
        let expected = [("helper", "a/b.rs"), ("the", "a/b.rs"), ("there", "a/c.rs")]
            .map(|(test, file)| format!("g.md: there is no test {test} in {file}"));
        assert_eq!(missing("g.md", guide, &sources), expected);
    }
}
