//! Leftovers and missing reasons, found line by line.

use super::Source;

/// Folders in which unsafe code may live; everywhere else the crate forbids or denies it.
const UNSAFE_ROOMS: [&str; 5] =
    ["kernels/", "kvtransfer/src/verbs", "kvtransfer/src/shm", "handover/src/", "engine/src/memory"];

pub(super) fn check(sources: &[Source]) -> Vec<String> {
    let mut findings = Vec::new();
    for source in sources {
        if source.path.starts_with("xtask/") {
            continue; // This file names what it looks for.
        }
        let lines: Vec<&str> = source.text.lines().collect();
        for (index, line) in lines.iter().enumerate() {
            for complaint in complaints(&source.path, &lines[..index], line) {
                findings.push(format!("{}:{}: {complaint}", source.path, index + 1));
            }
        }
        let opens_with_purpose = lines.first().is_some_and(|line| line.starts_with("//!"));
        if !opens_with_purpose {
            findings.push(format!("{}: opens without a line that says what the file is for", source.path));
        }
    }
    findings
}

fn complaints(path: &str, above: &[&str], line: &str) -> Vec<String> {
    let code = line.trim();
    let mut found = Vec::new();
    if (code.contains("TODO") || code.contains("FIXME")) && !code.contains("(#") {
        found.push("a TODO needs an issue number: TODO(#12)".to_owned());
    }
    if code.contains("todo!(") || code.contains("unimplemented!(") || code.contains("dbg!(") {
        found.push("unfinished code does not merge".to_owned());
    }
    if code.starts_with("#[ignore") && !code.contains("needs ") {
        found.push("an ignored test says what it needs: #[ignore = \"needs …\"]".to_owned());
    }
    let is_unsafe = ["unsafe {", "unsafe impl", "unsafe fn"].iter().any(|word| code.contains(word));
    if is_unsafe && !code.starts_with("//") {
        if !UNSAFE_ROOMS.iter().any(|room| path.starts_with(room)) {
            found.push("unsafe code outside its rooms (ARCHITECTURE.md)".to_owned());
        }
        if !code.contains("unsafe fn") && !has_reason(above, code) {
            found.push("unsafe without a SAFETY comment".to_owned());
        }
    }
    found
}

/// Whether a SAFETY comment stands right above, or above the statement that the line goes on with.
fn has_reason(above: &[&str], code: &str) -> bool {
    let nearby = above.iter().rev().take(8);
    code.contains("SAFETY:") || nearby.into_iter().any(|line| line.contains("SAFETY:"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_are_found() {
        #[rustfmt::skip]
        let rows = [
            ("plain code is fine",            "server/src/a.rs",   "//! a\nfn a() {}",                                0),
            ("a file needs a purpose",        "server/src/a.rs",   "fn a() {}",                                       1),
            ("a TODO needs a number",         "server/src/a.rs",   "//! a\n// TODO later",                            1),
            ("a TODO with a number is fine",  "server/src/a.rs",   "//! a\n// TODO(#7): later",                       0),
            ("ignored without a reason",      "server/src/a.rs",   "//! a\n#[ignore]",                                1),
            ("unsafe in the wrong room",      "server/src/a.rs",   "//! a\n// SAFETY: none\nunsafe { x() }",          1),
            ("unsafe without a reason",       "kernels/src/a.rs",  "//! a\nunsafe { x() }",                           1),
            ("unsafe with a reason",          "kernels/src/a.rs",  "//! a\n// SAFETY: checked\nunsafe { x() }",       0),
        ];
        for (row, path, text, expected) in rows {
            let source = Source { path: path.into(), text: text.into() };
            assert_eq!(check(&[source]).len(), expected, "{row}");
        }
    }
}
