//! House rules that the compiler does not check.
//!
//! Each rule is a function from the tracked sources to findings. Offenders that were there before a rule are
//! listed in `xtask/offenders.txt`, a list that may only shrink: an entry that is no longer needed is a finding.

mod arrows;
mod decisions;
mod lengths;
mod links;
mod named_tests;
mod words;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, process};

/// One tracked Rust source.
pub(crate) struct Source {
    /// Path from the root, with `/`.
    path: String,
    text: String,
}

/// Runs every rule on the repository at `root`; one line per finding.
pub fn check(root: &Path) -> Vec<String> {
    let sources = sources(root);
    let mut findings = arrows::check(root);
    findings.extend(words::check(&sources));
    findings.extend(lengths::check(&sources, &read_offenders(root)));
    findings.extend(named_tests::check(root, &sources));
    findings.extend(decisions::check(root, &sources));
    findings.extend(links::check(root));
    findings
}

/// Lowers the list of known offenders to what is there today. Never adds or raises an entry.
pub fn shrink(root: &Path) -> Vec<String> {
    let known = read_offenders(root);
    let present = lengths::measure(&sources(root));
    let kept: BTreeMap<String, usize> = known
        .iter()
        .filter_map(|(name, allowed)| Some((name.clone(), (*present.get(name)?).min(*allowed))))
        .collect();
    let text: String = kept.iter().map(|(name, lines)| format!("{lines} {name}\n")).collect();
    match fs::write(root.join(OFFENDERS), text) {
        Ok(()) => check(root),
        Err(error) => vec![format!("cannot write {OFFENDERS}: {error}")],
    }
}

fn read_offenders(root: &Path) -> BTreeMap<String, usize> {
    let text = fs::read_to_string(root.join(OFFENDERS)).unwrap_or_default();
    text.lines()
        .filter_map(|line| {
            let (lines, name) = line.split_once(' ')?;
            Some((name.to_owned(), lines.parse().ok()?))
        })
        .collect()
}

/// Rust sources that git tracks or would track.
fn sources(root: &Path) -> Vec<Source> {
    let listed = process::Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.rs"])
        .current_dir(root)
        .output()
        .expect("git lists the sources");
    let mut paths: Vec<String> = String::from_utf8(listed.stdout)
        .expect("source paths are UTF-8")
        .split_terminator('\0')
        .map(str::to_owned)
        .collect();
    if paths.is_empty() {
        // An exported tree without git: walk it.
        walk(root, root, &mut paths);
    }
    paths
        .into_iter()
        .filter_map(|path| Some(Source { text: fs::read_to_string(root.join(&path)).ok()?, path }))
        .collect()
}

fn walk(root: &Path, folder: &Path, paths: &mut Vec<String>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() && !name.starts_with('.') && name != "target" {
            walk(root, &path, paths);
        } else if name.ends_with(".rs") {
            let relative: PathBuf = path.strip_prefix(root).expect("below the root").to_path_buf();
            paths.push(relative.to_string_lossy().into_owned());
        }
    }
}

const OFFENDERS: &str = "xtask/offenders.txt";
