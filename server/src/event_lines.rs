//! Server-sent events out of bytes that arrive in any portions.

/// Collects bytes into events.
#[derive(Debug, Default)]
pub(crate) struct EventLines {
    /// The beginning of a line.
    line: Vec<u8>,
    /// The data of the event so far.
    data: Option<String>,
}

impl EventLines {
    /// Adds bytes and returns the data of each event that they complete. Comments and other fields are dropped.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<String> {
        let mut events = Vec::new();
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
                continue;
            }
            let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
            let line = line.strip_suffix('\r').unwrap_or(&line);
            if line.is_empty() {
                events.extend(self.data.take());
            } else if let Some(data) = line.strip_prefix("data:") {
                let data = data.strip_prefix(' ').unwrap_or(data);
                match &mut self.data {
                    Some(before) => {
                        before.push('\n');
                        before.push_str(data);
                    }
                    None => self.data = Some(data.to_owned()),
                }
            }
        }
        events
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_the_same_however_the_bytes_arrive() {
        let rows: &[(&str, &str, &[&str])] = &[
            ("one event", "data: a\n\n", &["a"]),
            ("two events", "data: a\n\ndata: b\n\n", &["a", "b"]),
            ("without the space", "data:a\n\n", &["a"]),
            ("two spaces are one of data", "data:  a\n\n", &[" a"]),
            ("carriage returns", "data: a\r\n\r\n", &["a"]),
            ("comments keep the connection", ": here\n\ndata: a\n\n", &["a"]),
            ("other fields", "event: x\nid: 7\ndata: a\n\n", &["a"]),
            ("data of two lines", "data: a\ndata: b\n\n", &["a\nb"]),
            ("an event that is not whole", "data: a\n", &[]),
            ("characters of several bytes", "data: é🙂\n\n", &["é🙂"]),
        ];
        for (rule, text, expected) in rows {
            for portion in 1..=text.len() {
                let mut lines = EventLines::default();
                let events: Vec<String> =
                    text.as_bytes().chunks(portion).flat_map(|part| lines.push(part)).collect();
                assert_eq!(events, *expected, "{rule}, {portion} bytes at a time");
            }
        }
    }
}
