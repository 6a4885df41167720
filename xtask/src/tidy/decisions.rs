//! Decisions are numbered one by one, and whoever refers to one means one that is there.

use std::collections::BTreeSet;
use std::path::Path;

use super::Source;

/// Checks the numbers of the files in `docs/decisions`, their titles, and references to them in sources.
pub(super) fn check(root: &Path, sources: &[Source]) -> Vec<String> {
    let folder = root.join(FOLDER);
    let mut names: Vec<String> = std::fs::read_dir(&folder)
        .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
        .unwrap_or_default();
    names.sort();
    let titled: Vec<(String, String)> = names
        .into_iter()
        .map(|name| {
            let text = std::fs::read_to_string(folder.join(&name)).unwrap_or_default();
            (name, text.lines().next().unwrap_or_default().to_owned())
        })
        .collect();
    let mut findings = check_numbers(&titled);
    let numbers: BTreeSet<&str> = titled.iter().filter_map(|(name, _)| name.get(..DIGITS)).collect();
    for source in sources {
        findings.extend(check_references(source, &numbers));
    }
    findings
}

/// File number `n` in order begins with `n` in its name and in its title.
fn check_numbers(titled: &[(String, String)]) -> Vec<String> {
    let mut findings = Vec::new();
    for ((name, title), number) in titled.iter().zip(1..) {
        let begins = format!("{number:0DIGITS$}-");
        if !name.starts_with(&begins) {
            findings.push(format!(
                "{FOLDER}/{name}: decisions are numbered one by one, this one is {number:0DIGITS$}"
            ));
        } else if !title.starts_with(&format!("# {number}. ")) {
            findings.push(format!("{FOLDER}/{name}: the title begins with \"# {number}. \""));
        }
    }
    findings
}

fn check_references(source: &Source, numbers: &BTreeSet<&str>) -> Vec<String> {
    let mentioned = source.text.split(MENTION).skip(1);
    let mentioned =
        mentioned.filter_map(|rest| rest.get(..DIGITS)).filter(|number| number.parse::<u32>().is_ok());
    let missing = mentioned.filter(|number| !numbers.contains(number));
    missing.map(|number| format!("{}: there is no {MENTION}{number}", source.path)).collect()
}

const FOLDER: &str = "docs/decisions";
const MENTION: &str = "docs/decisions/";
const DIGITS: usize = 4;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_follow_each_other() {
        let titled = |rows: &[(&str, &str)]| -> Vec<(String, String)> {
            rows.iter().map(|(name, title)| ((*name).to_owned(), (*title).to_owned())).collect()
        };
        #[rustfmt::skip]
        let rows: [(&[(&str, &str)], usize); 4] = [
            (&[("0001-a.md", "# 1. A"), ("0002-b.md", "# 2. B")], 0),
            (&[("0001-a.md", "# 1. A"), ("0001-b.md", "# 1. B")], 1),
            (&[("0001-a.md", "# 1. A"), ("0003-b.md", "# 3. B")], 1),
            (&[("0001-a.md", "# 2. A")], 1),
        ];
        for (files, findings) in rows {
            assert_eq!(check_numbers(&titled(files)).len(), findings, "{files:?}");
        }
    }

    #[test]
    fn references_exist() {
        let numbers = BTreeSet::from(["0001"]);
        let source = |text: String| Source { path: "a.rs".to_owned(), text };
        assert!(
            check_references(&source(format!("see {MENTION}0001 and {MENTION}NAME")), &numbers).is_empty()
        );
        assert_eq!(check_references(&source(format!("see {MENTION}0002")), &numbers).len(), 1);
    }
}
