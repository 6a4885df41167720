//! `tidemill doctor`: what this machine offers, and what Tidemill would make of it.
//!
//! Reads `/proc` and `/sys` and loads no library but those that it asks for GPUs and RDMA devices, so that it tells the
//! truth on a machine where half of it is missing. Each finding is a line with a verdict; text and JSON are two views of the list.

mod pair;
mod probes;

use std::process::ExitCode;

use serde::Serialize;

use crate::flags::DoctorFlags;

/// One thing looked at.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Finding {
    /// What was looked at.
    subject: &'static str,
    /// What was found.
    found: String,
    /// What it means.
    verdict: Verdict,
    /// What to do about it, where there is something to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<String>,
}

/// What a finding means for Tidemill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Verdict {
    /// Used, or good as it is.
    Good,
    /// Works, but something better is possible.
    Limited,
    /// Not there, or not used by this version.
    Absent,
}

impl Finding {
    pub(crate) fn good(subject: &'static str, found: impl Into<String>) -> Self {
        Self { subject, found: found.into(), verdict: Verdict::Good, hint: None }
    }

    pub(crate) fn limited(subject: &'static str, found: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { subject, found: found.into(), verdict: Verdict::Limited, hint: Some(hint.into()) }
    }

    pub(crate) fn absent(subject: &'static str, found: impl Into<String>) -> Self {
        Self { subject, found: found.into(), verdict: Verdict::Absent, hint: None }
    }
}

/// Looks at everything and prints it.
#[expect(clippy::print_stdout, reason = "the report is the program's output")]
pub(crate) fn run(flags: &DoctorFlags) -> anyhow::Result<ExitCode> {
    if let Some(address) = flags.serve {
        return pair::answer(address, flags.transport);
    }
    let findings = match &flags.peer {
        Some(peer) => pair::findings(peer, flags.transport)?,
        None => probes::all(flags.cpu_isa),
    };
    if flags.json {
        let report = serde_json::json!({"version": crate::VERSION, "findings": findings});
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("tidemill {}\n", crate::VERSION);
        print!("{}", text(&findings));
    }
    Ok(ExitCode::SUCCESS)
}

fn text(findings: &[Finding]) -> String {
    let width = findings.iter().map(|finding| finding.subject.len()).max().unwrap_or(0);
    findings
        .iter()
        .map(|Finding { subject, found, verdict, hint }| {
            let mark = match verdict {
                Verdict::Good => "ok",
                Verdict::Limited => "! ",
                Verdict::Absent => "- ",
            };
            let hint = hint.iter().map(|hint| format!("\n     {:width$}  → {hint}", "")).collect::<String>();
            format!("  {mark} {subject:width$}  {found}{hint}\n")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_lines_up_and_hints_follow_their_line() {
        let findings =
            [Finding::good("cores", "2"), Finding::limited("memory locking", "8 MiB", "raise `ulimit -l`")];
        let expected =
            "  ok cores           2\n  !  memory locking  8 MiB\n                     → raise `ulimit -l`\n";
        assert_eq!(text(&findings), expected);
    }

    #[test]
    fn every_machine_gets_a_whole_report() {
        let findings = probes::all(None);
        for subject in ["processor", "instructions", "cores", "memory", "gpus", "rdma", "would use"] {
            assert!(findings.iter().any(|finding| finding.subject == subject), "{subject} in {findings:?}");
        }
        assert!(findings.iter().all(|finding| !finding.found.is_empty()));
    }
}
