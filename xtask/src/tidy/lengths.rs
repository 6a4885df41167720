//! Files and functions that fit a screen and a head.
//!
//! A line of code is one that is neither blank nor only a comment. Tests do not count: a table has as many rows as
//! there are rules.

use std::collections::BTreeMap;

use syn::spanned::Spanned;
use syn::visit::{self, Visit};

use super::Source;

/// Lines of code in a file.
const FILE_LINES: usize = 400;
/// Lines of code in a function.
const FUNCTION_LINES: usize = 70;

/// Findings against the limits and the known offenders (name → lines allowed).
pub(super) fn check(sources: &[Source], offenders: &BTreeMap<String, usize>) -> Vec<String> {
    let present = measure(sources);
    let grown = present.iter().filter_map(|(name, lines)| match offenders.get(name) {
        None => {
            Some(format!("{name} has {lines} lines of code (file ≤ {FILE_LINES}, fn ≤ {FUNCTION_LINES})"))
        }
        Some(allowed) if allowed < lines => Some(format!("{name} grew from {allowed} to {lines} lines")),
        Some(_) => None,
    });
    let stale = offenders.iter().filter_map(|(name, allowed)| match present.get(name) {
        Some(lines) if lines == allowed => None,
        Some(lines) if lines > allowed => None, // Reported as grown.
        _ => Some(format!("{name} shrank: run `cargo xtask tidy --shrink`")),
    });
    grown.chain(stale).collect()
}

/// Everything over its limit: `path` or `path::function` → lines of code.
pub(super) fn measure(sources: &[Source]) -> BTreeMap<String, usize> {
    let mut over = BTreeMap::new();
    for source in sources {
        if source.path.contains("/tests/") || source.path.ends_with("/tests.rs") {
            continue;
        }
        let Ok(file) = syn::parse_file(&source.text) else { continue };
        let lines = CodeLines::of(&source.text);
        let mut visitor = Visitor { lines: &lines, path: &source.path, test_lines: 0, over: &mut over };
        visitor.visit_file(&file);
        let in_tests = visitor.test_lines;
        let total = lines.between(1, usize::MAX) - in_tests;
        if FILE_LINES < total {
            over.insert(source.path.clone(), total);
        }
    }
    over
}

struct Visitor<'a> {
    lines: &'a CodeLines,
    path: &'a str,
    test_lines: usize,
    over: &'a mut BTreeMap<String, usize>,
}

impl Visitor<'_> {
    fn function(&mut self, name: &syn::Ident, span: proc_macro2::Span) {
        let lines = self.lines.between(span.start().line, span.end().line);
        if FUNCTION_LINES < lines {
            let entry = self.over.entry(format!("{}::{name}", self.path)).or_default();
            *entry = lines.max(*entry);
        }
    }
}

impl<'ast> Visit<'ast> for Visitor<'_> {
    fn visit_item_mod(&mut self, module: &'ast syn::ItemMod) {
        let is_test = module.attrs.iter().any(|attribute| {
            attribute.path().is_ident("cfg")
                && attribute.parse_args::<syn::Ident>().is_ok_and(|condition| condition == "test")
        });
        if is_test {
            let span = module.span();
            self.test_lines += self.lines.between(span.start().line, span.end().line);
            return;
        }
        visit::visit_item_mod(self, module);
    }

    fn visit_item_fn(&mut self, function: &'ast syn::ItemFn) {
        self.function(&function.sig.ident, function.block.span());
        visit::visit_item_fn(self, function);
    }

    fn visit_impl_item_fn(&mut self, function: &'ast syn::ImplItemFn) {
        self.function(&function.sig.ident, function.block.span());
        visit::visit_impl_item_fn(self, function);
    }
}

/// For each line of a file, how many lines of code end at or before it.
struct CodeLines(Vec<usize>);

impl CodeLines {
    fn of(text: &str) -> Self {
        let mut seen = 0;
        let cumulative = text.lines().map(|line| {
            let line = line.trim();
            seen += usize::from(!line.is_empty() && !line.starts_with("//"));
            seen
        });
        Self(std::iter::once(0).chain(cumulative).collect())
    }

    /// Lines of code from line `first` to line `last`, both counted from 1 and included.
    fn between(&self, first: usize, last: usize) -> usize {
        let end = last.min(self.0.len() - 1);
        self.0[end] - self.0[first - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(function_lines: usize) -> Source {
        let body = "    let _ = 1;\n    // why\n\n".repeat(function_lines.saturating_sub(2));
        Source { path: "a/src/b.rs".into(), text: format!("fn long() {{\n{body}}}\n") }
    }

    #[test]
    fn only_code_counts_and_offenders_may_only_shrink() {
        let offender = |lines| BTreeMap::from([("a/src/b.rs::long".to_owned(), lines)]);
        #[rustfmt::skip]
        let rows = [
            ("at the limit",                   70, BTreeMap::new(), 0),
            ("over the limit",                 71, BTreeMap::new(), 1),
            ("a known offender",               80, offender(80),    0),
            ("a known offender that grew",     81, offender(80),    1),
            ("an offender that shrank",        75, offender(80),    1),
            ("an offender that is one no more", 60, offender(80),   1),
        ];
        for (row, lines, offenders, expected) in rows {
            assert_eq!(check(&[source(lines)], &offenders).len(), expected, "{row}");
        }
    }
}
