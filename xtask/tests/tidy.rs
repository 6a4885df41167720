//! The house rules hold for the repository itself.

#[test]
fn the_repository_is_tidy() {
    let findings = xtask::tidy::check(&xtask::root());
    assert!(findings.is_empty(), "tidy:\n{}", findings.join("\n"));
}
