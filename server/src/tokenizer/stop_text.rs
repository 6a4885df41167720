//! Looks for stop strings in a text that arrives in pieces.
//!
//! A stop string may begin in one token and end in another, so text that could be its beginning is held back until
//! it is certain.

/// Searches one text.
#[derive(Debug)]
pub(crate) struct StopText {
    stops: Vec<String>,
    /// Whether the stop string itself belongs to the answer.
    include: bool,
    /// The end of the text so far, as far as it may begin a stop string.
    held: String,
}

/// A stop string was found: what is left of the answer, and which string it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// The last text of the answer.
    pub(crate) text: String,
    /// The stop string.
    pub(crate) stop: String,
}

impl StopText {
    /// Looks for any of `stops`; none of them is empty.
    pub(crate) fn new(stops: Vec<String>, include: bool) -> Self {
        assert!(
            stops.iter().all(|stop| !stop.is_empty()),
            "an empty stop string would end every text at once"
        );
        Self { stops, include, held: String::new() }
    }

    /// Adds text; returns what is certainly part of the answer, or where it ends.
    pub(crate) fn push(&mut self, text: &str) -> Result<String, Found> {
        self.held.push_str(text);
        let first = self.stops.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop)));
        if let Some((start, stop)) = first.min_by_key(|(start, _)| *start) {
            let end = if self.include { start + stop.len() } else { start };
            let stop = stop.clone();
            let text = self.held[..end].to_owned();
            self.held.clear();
            return Err(Found { text, stop });
        }
        let certain = self.held.len() - self.open();
        Ok(self.held.drain(..certain).collect())
    }

    /// Adds text that is not searched, because the answer may not end yet.
    pub(crate) fn pass(&mut self, text: &str) -> String {
        let mut passed = std::mem::take(&mut self.held);
        passed.push_str(text);
        passed
    }

    /// Ends the text: what was held back was no stop string.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Length of the longest end of `held` that begins a stop string.
    fn open(&self) -> usize {
        let held = self.held.as_bytes();
        let longest = |stop: &String| {
            let stop = stop.as_bytes();
            (1..stop.len().min(held.len() + 1)).rev().find(|&length| held.ends_with(&stop[..length]))
        };
        self.stops.iter().filter_map(longest).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pieces that leave, joined by `|`; then `#stop` when one was found.
    fn check(stops: &[&str], include: bool, pieces: &[&str]) -> String {
        let mut search = StopText::new(stops.iter().map(ToString::to_string).collect(), include);
        let mut told = Vec::new();
        for piece in pieces {
            match search.push(piece) {
                Ok(text) => told.push(text),
                Err(found) => {
                    told.push(found.text);
                    return format!("{}#{}", told.join("|"), found.stop);
                }
            }
        }
        told.push(search.finish());
        told.join("|")
    }

    #[test]
    fn stop_strings_are_found_across_pieces() {
        type Row = (&'static str, &'static [&'static str], bool, &'static [&'static str], &'static str);
        let rows: &[Row] = &[
            ("no stop string, nothing held", &[], false, &["ab", "c"], "ab|c|"),
            ("whole in one piece", &["END"], false, &["a END b"], "a #END"),
            ("included when asked for", &["END"], true, &["a END b"], "a END#END"),
            ("split over pieces", &["END"], false, &["a E", "N", "D b"], "a ||#END"),
            ("split over pieces, included", &["END"], true, &["a E", "N", "D b"], "a ||END#END"),
            ("a beginning that is none", &["END"], false, &["a E", "x"], "a |Ex|"),
            ("a beginning at the end of the text", &["END"], false, &["a EN"], "a |EN"),
            ("a beginning inside a beginning", &["aab"], false, &["aa", "a", "b"], "|a|#aab"),
            ("the earliest wins", &["c", "b"], false, &["abc"], "a#b"),
            ("at the same place the first named wins", &["ab", "abc"], false, &["abc"], "#ab"),
            ("a character is never cut", &["é!"], false, &["aé", "è"], "a|éè|"),
            ("characters that share a first byte", &["é"], false, &["è"], "è|"),
        ];
        for (rule, stops, include, pieces, expected) in rows {
            assert_eq!(check(stops, *include, pieces), *expected, "{rule}");
        }
    }

    #[test]
    fn unsearched_text_passes_with_what_was_held() {
        let mut search = StopText::new(vec!["END".to_owned()], false);
        assert_eq!(search.push("E"), Ok(String::new()));
        assert_eq!(search.pass("ND"), "END");
        assert_eq!(search.finish(), "");
    }
}
