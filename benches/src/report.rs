//! The table, and the line that each row leaves behind.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::Path;
use std::process::Command;
use std::time::SystemTime;

use serde_json::json;

/// One number beside its limit.
pub(crate) struct Row {
    pub(crate) measure: String,
    /// The median, with `unit`.
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
    /// What limits it, in the same unit, and what that is.
    pub(crate) limit: Option<(f64, &'static str)>,
    /// What is promised.
    pub(crate) target: Option<Target>,
    /// What one has to know to read it.
    pub(crate) note: String,
}

/// A promise, about the value itself or about a ratio to the limit.
#[derive(Clone, Copy)]
pub(crate) enum Target {
    AtMost(f64),
    /// The ratio as measured, pair by pair, and what it must reach.
    Ratio {
        measured: f64,
        at_least: f64,
    },
    /// The same, where less is better.
    Share {
        measured: f64,
        at_most: f64,
    },
}

pub(crate) struct Report {
    rows: Vec<Row>,
    load_at_start: String,
}

impl Target {
    fn is_met(self, value: f64) -> bool {
        match self {
            Self::AtMost(most) => value <= most,
            Self::Ratio { measured, at_least } => at_least <= measured,
            Self::Share { measured, at_most } => measured <= at_most,
        }
    }

    fn ratio(self) -> Option<f64> {
        match self {
            Self::AtMost(_) => None,
            Self::Ratio { measured, .. } | Self::Share { measured, .. } => Some(measured),
        }
    }

    fn describe(self, unit: &str) -> String {
        match self {
            Self::AtMost(most) => format!("<= {} {unit}", short(most)),
            Self::Ratio { at_least, .. } => format!(">= {:.0} %", at_least * 100.0),
            Self::Share { at_most, .. } => format!("<= {} %", short(at_most * 100.0)),
        }
    }
}

impl Report {
    pub(crate) fn begin() -> Self {
        Self { rows: Vec::new(), load_at_start: load() }
    }

    pub(crate) fn add(&mut self, rows: Vec<Row>) {
        self.rows.extend(rows);
    }

    pub(crate) fn print(&self) {
        let mut out = io::stdout().lock();
        let _ = self.write_table(&mut out); // A closed pipe is the reader's wish.
    }

    fn write_table(&self, out: &mut impl Write) -> io::Result<()> {
        writeln!(out, "{}; commit {}; load {} → {}", cpu(), commit(), self.load_at_start, load())?;
        writeln!(out, "| measure | median | limit | ratio | target | met | remarks |")?;
        writeln!(out, "|---|---|---|---|---|---|---|")?;
        for Row { measure, value, unit, limit, target, note } in &self.rows {
            let limit =
                limit.map_or_else(String::new, |(limit, what)| format!("{} {unit} ({what})", short(limit)));
            let ratio = target.and_then(Target::ratio);
            let ratio = ratio.map_or_else(String::new, |ratio| format!("{} %", short(ratio * 100.0)));
            let promised = target.map_or_else(String::new, |target| target.describe(unit));
            let met = target.map_or("", |target| if target.is_met(*value) { "yes" } else { "**no**" });
            let value = short(*value);
            writeln!(
                out,
                "| {measure} | {value} {unit} | {limit} | {ratio} | {promised} | {met} | {note} |"
            )?;
        }
        Ok(())
    }

    /// Appends the rows to a file, one JSON object a line.
    pub(crate) fn append(&self, path: &Path) -> io::Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        let time = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let (cpu, commit, load) = (cpu(), commit(), load());
        for Row { measure, value, unit, limit, target, note } in &self.rows {
            let line = json!({
                "measure": measure, "value": value, "unit": unit,
                "limit": limit.map(|(limit, _)| limit), "limit_is": limit.map(|(_, what)| what),
                "ratio": target.and_then(Target::ratio), "target": target.map(|target| target.describe(unit)),
                "met": target.map(|target| target.is_met(*value)), "note": note,
                "time": time, "cpu": cpu, "cores": cores(), "commit": commit,
                "load_at_start": self.load_at_start, "load_at_end": load,
            });
            writeln!(file, "{line}")?;
        }
        Ok(())
    }
}

/// Three digits that count.
fn short(value: f64) -> String {
    match value.abs() {
        large if 100.0 <= large => format!("{value:.0}"),
        middle if 10.0 <= middle => format!("{value:.1}"),
        small if 0.1 <= small => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn cpu() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    format!("{} ({} cores)", name.map_or("unknown CPU", |(_, name)| name), cores())
}

fn load() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("?").to_owned()
}

/// The commit that was measured, with a mark when the tree differs from it.
fn commit() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let Some(commit) = git(&["rev-parse", "--short", "HEAD"]) else { return "unknown".to_owned() };
    let is_clean =
        git(&["status", "--porcelain", "--untracked-files=no"]).is_some_and(|text| text.is_empty());
    if is_clean { commit } else { format!("{commit}+changes") }
}
