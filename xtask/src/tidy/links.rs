//! Links that git tracks lead to something in the tree: one to a folder of somebody's machine leads nowhere on all others.

use std::path::{Component, Path, PathBuf};
use std::{fs, process};

pub(super) fn check(root: &Path) -> Vec<String> {
    let listed = process::Command::new("git")
        .args(["ls-files", "-z", "--stage"])
        .current_dir(root)
        .output()
        .expect("git lists the files");
    let listed = String::from_utf8_lossy(&listed.stdout);
    let links = listed
        .split_terminator('\0')
        .filter_map(|entry| entry.split_once('\t'))
        .filter(|(about, _)| about.starts_with(LINK));
    links.filter_map(|(_, path)| complaint(path, &fs::read_link(root.join(path)).ok()?)).collect()
}

/// What `path`, from the root, is told if it is a link to `target`.
fn complaint(path: &str, target: &Path) -> Option<String> {
    let mut place: PathBuf = Path::new(path).parent()?.to_path_buf();
    for part in target.components() {
        let inside = match part {
            Component::Normal(name) => {
                place.push(name);
                true
            }
            Component::CurDir => true,
            Component::ParentDir => place.pop(),
            Component::RootDir | Component::Prefix(_) => false,
        };
        if !inside {
            return Some(format!("{path} is a link out of the tree, to {}", target.display()));
        }
    }
    None
}

/// The mode of links, with which git's lines about them begin.
const LINK: &str = "120000 ";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_out_of_the_tree_are_found() {
        #[rustfmt::skip]
        let rows = [
            // link         target          leaves
            ("a/b/link",    "c",            false),
            ("a/b/link",    "../../c/d",    false),
            ("a/b/link",    "../../../c",   true),
            ("link",        "./c",          false),
            ("link",        "../c",         true),
            ("link",        "/home/me/c",   true),
        ];
        for (path, target, leaves) in rows {
            assert_eq!(complaint(path, Path::new(target)).is_some(), leaves, "{path} -> {target}");
        }
    }
}
